"""A stream: a model, tasks in an order, how each is trained, and the methods, seeds and orders that are compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from ..training.base_model import BaseModel, computes_bfloat16
from ..training.texts import read_paragraphs
from ..tuner.files import digest_of_folder, may_be_hub_id, user_path
from .methods import Method, make_method
from .settings import Count, DataPath, FolderName, Positive, Settings, StreamError, path_in_data, require_known
from .task import Task

# those of transformers that need no other arguments
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


class Training(Settings):
    """How every method trains every task.

    Args:
        epochs: passes over a task's data; a task may override it.
        max_steps: number of steps of a task; overrides ``epochs``.
        batch_size: examples in one forward pass, on all devices together.
        gradient_accumulation: forward passes before one step.
        learning_rate: maximum of the schedule; a method with a preset has its own default.
        schedule: ``lr_scheduler_type`` of transformers; it restarts with each task.
        warmup_ratio: share of a task's steps; with ``preset="retain"`` at least 0.3.
        weight_decay, max_grad_norm: as in transformers.
        bf16: train and evaluate float32 weights in bfloat16 autocast, as in transformers; "auto" enables it if the
            device supports it in hardware.
        evaluation_batch_size: prompts that are answered together; ``batch_size`` if None.
    """

    epochs: Positive = 1.0
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Positive = 2e-4
    schedule: Schedule = "linear"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    # resolved when the file is read, so that a resumed run continues with the same precision
    bf16: Annotated[bool, BeforeValidator(lambda value: computes_bfloat16() if value == "auto" else value)] = False
    evaluation_batch_size: Count | None = None


TextFile = Annotated[DataPath, AfterValidator(lambda path: read_paragraphs(path) and path)]
"""Reading it raises an error for a missing or empty file."""


class General(Settings):
    """A measure of general ability, in addition to the tasks.

    Args:
        text: file of plain text in paragraphs, whose loss is compared with the base model's after every task.
        other: a file of another kind of text, measured in the same way; None for none.
        kl: also measure, after every task, how far the model's answers to it are from those of the base model. It
            loads a second copy of the base model.
    """

    text: TextFile
    other: TextFile | None = None
    kl: bool = False

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the files, and the setting."""
        files = {"text": self.text, "other": self.other}
        digests = {name: digest_of_folder(Path(file)) for name, file in files.items() if file is not None}
        return {**digests, "kl": True} if self.kl else digests


class Gate(Settings):
    """The share of an earlier task's score that must remain, and what happens if it does not.

    Args:
        keep: task -> share of its score right after it was learned, in (0, 1]; "*" stands for all other tasks.
        action: "stop" ends the run after the task that broke the gate. "rollback" restores the weights from before
            that task, bit for bit, and continues with the next task.
    """

    keep: dict[str, Annotated[float, Field(gt=0, le=1, strict=True)]] = Field(min_length=1)
    action: Literal["stop", "rollback"] = "stop"

    def violations(self, learned: Mapping[str, float], scores: Mapping[str, float]) -> list[dict[str, Any]]:
        """The earlier tasks whose score fell too low: ``[{"earlier", "score", "needed"}]``; ``learned`` is R[j,j]."""
        shares = {task: self.keep.get(task, self.keep.get("*")) for task in learned}
        return [
            {"earlier": task, "score": scores[task], "needed": share * learned[task]}
            for task, share in shares.items()
            if share is not None and scores[task] < share * learned[task]
        ]


class MethodSettings(Settings):
    """A method of a stream: its name in the registry, the label of its runs, and its options as further fields.

    A file may give the name alone. ``learning_rates`` override those of the stream.
    """

    model_config = ConfigDict(extra="allow")
    name: str = Field(min_length=1)
    label: FolderName
    learning_rates: tuple[Positive, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            return value
        paths = {"reference": _existing_paths(value["reference"], info)} if "reference" in value else {}
        return {"label": value.get("name"), **value, **paths}

    @model_validator(mode="after")
    def _check(self) -> MethodSettings:
        self.method()  # raises an error for an illegal option
        return self

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method."""
        return self.model_extra or {}

    def method(self) -> Method:
        """A new method with these options."""
        return make_method(self.name, **self.options)


def _existing_paths(value: Any, info: ValidationInfo) -> Any:
    """A name or a list of names; names of files and folders in the data folder become paths."""
    if isinstance(value, list):
        return [_existing_paths(entry, info) for entry in value]
    path = path_in_data(value, info) if isinstance(value, str) else ""
    return path if path and Path(path).exists() else value


class Order(NamedTuple):
    """A name and all tasks in one order."""

    name: str
    tasks: tuple[Task, ...]


def _base_model(value: Any, info: ValidationInfo) -> Any:
    """The base model of a name or of the fields of a mapping."""
    fields = {"name": str(value)} if isinstance(value, (str, Path)) else value
    if not isinstance(fields, Mapping) or info.context is None:
        return fields
    if "trust_remote_code" in fields:  # a file may come from anywhere
        raise ValueError("a file cannot set trust_remote_code; pass a BaseModel from Python")
    require_known(fields, [field.name for field in dataclasses.fields(BaseModel)])
    path = info.context["folder"] / user_path(str(fields.get("name", "")))
    if path.is_dir():
        return {**fields, "name": str(path)}
    if not may_be_hub_id(str(fields.get("name", ""))):
        raise ValueError(f"no folder {path}")
    return fields


class Stream(Settings):
    """Everything that a comparison consists of. ``read_stream`` reads it from a file.

    Args:
        model: the base model that every run starts from.
        tasks: in the order called "given".
        methods: compared with one another.
        training: the same for all methods.
        learning_rates: every method without its own runs with each of them; empty: only with that of ``training``.
        seeds: of all random draws.
        orders: "given", "reversed", "random:3" (a random order that depends only on the seed 3 and the names of the
            tasks), or a tuple of the tasks' names.
        general: measures of general ability; None for none.
        gate: limits on the loss of earlier tasks' scores; None for none.
    """

    other_fields: ClassVar[tuple[str, ...]] = ("data", "task_defaults")
    model: Annotated[BaseModel, BeforeValidator(_base_model)]
    tasks: tuple[Task, ...] = Field(min_length=1)
    methods: tuple[MethodSettings, ...] = Field(min_length=1)
    training: Training = Training()
    learning_rates: tuple[Positive, ...] = ()
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field((0,), min_length=1)
    orders: tuple[str | tuple[str, ...], ...] = Field(("given",), min_length=1)
    general: General | None = None
    gate: Gate | None = None

    @model_validator(mode="after")
    def _check(self) -> Stream:
        lists: dict[str, list[Any]] = {
            "tasks": [task.name for task in self.tasks],
            "methods": [method.label for method in self.methods],
            "learning_rates": list(self.learning_rates),
            **{f"learning_rates of {method.label}": list(method.learning_rates) for method in self.methods},
            "seeds": list(self.seeds),
            "orders": [order.name for order in self.task_orders()],
        }
        for name, values in lists.items():
            if duplicates := [value for value in values if values.count(value) > 1]:
                hint = "; give them different labels" if name == "methods" else ""
                raise StreamError(f"{name} contains {duplicates[0]!r} more than once{hint}")
        if self.gate is not None:
            require_known(self.gate.keep, [*lists["tasks"], "*"], "task in gate.keep:")
        if self.model.is_quantized:
            for method in self.methods:
                if not method.method().supports_quantized:
                    raise StreamError(f"methods: {method.label!r} changes the weights of the model, which is quantized")
        return self

    def with_methods(self, labels: Sequence[str]) -> Stream:
        """The stream with only the methods of these labels; raises StreamError for an unknown one."""
        by_label = {method.label: method for method in self.methods}
        require_known(labels, list(by_label), "label in --methods:")
        return self.model_copy(update={"methods": tuple(by_label[label] for label in labels)})

    def rates(self, method: MethodSettings) -> tuple[float, ...]:
        """The learning rates that a method runs with."""
        rate = self.training.learning_rate
        if "learning_rate" not in self.training.model_fields_set:
            rate = method.method().recommended_learning_rate or rate
        return method.learning_rates or self.learning_rates or (rate,)

    def training_of(self, task: Task) -> Training:
        """How this task is trained, with its own number of epochs."""
        return self.training if task.epochs is None else self.training.model_copy(update={"epochs": task.epochs})

    def task_orders(self) -> list[Order]:
        """The tasks in each of ``orders``."""
        by_name = {task.name: task for task in self.tasks}
        orders = []
        for order in self.orders:
            drawn = re.fullmatch(r"random:(\d+)", order) if isinstance(order, str) else None
            names = [order] if isinstance(order, str) else list(order)
            if order in ("given", "reversed"):
                names = list(by_name)[:: 1 if order == "given" else -1]
            elif drawn:
                # by hashes of the names: independent of the version of Python and of the order in the file
                digests = {name: hashlib.sha256(f"{drawn[1]}:{name}".encode()).hexdigest() for name in by_name}
                names = sorted(by_name, key=digests.__getitem__)
            if sorted(names) != sorted(by_name):
                legal = f"given, reversed, random:SEED, or a list of all tasks: {', '.join(by_name)}"
                raise StreamError(f"orders: unknown order {order!r}; legal are {legal}")
            name = order if isinstance(order, str) else ",".join(order)
            orders.append(Order(name, tuple(by_name[name] for name in names)))
        return orders

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the results of the runs, as JSON types. Files are represented by digests.

        It contains no methods, seeds, orders and learning rates to be compared: a run has one of each, and adding
        another one does not change existing runs.
        """
        fields = self.model_dump(mode="json", include={"model", "training", "gate"})
        for name in ("device_map", "trust_remote_code"):  # these do not change the weights
            del fields["model"][name]
        if Path(self.model.name).is_dir():
            fields["model"]["name"] = digest_of_folder(Path(self.model.name))
        return {
            **fields,
            "tasks": {task.name: task.fingerprint() for task in self.tasks},
            "general": None if self.general is None else self.general.fingerprint(),
            "order": [task.name for task in self.tasks],
        }


def differences(fingerprint: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """The differences of two fingerprints, such as "training.epochs: 1.0 instead of 3.0"; empty if they are equal."""
    from pandas import json_normalize

    def text(values: Mapping[str, Any], name: str) -> str:
        value = json.dumps(values[name], ensure_ascii=False) if name in values else "missing"  # 1 is not true
        return f"content {value[1:9]}" if re.fullmatch(r'"[0-9a-f]{64}"', value) else value

    now, before = (json_normalize(dict(each)).to_dict("records")[0] for each in (fingerprint, saved))
    texts = {name: (text(now, name), text(before, name)) for name in {**now, **before}}
    return [f"{name}: {a} instead of {b}" for name, (a, b) in texts.items() if a != b]
