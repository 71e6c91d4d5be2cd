"""A stream: a model, tasks in an order, how each is trained, and which methods, seeds and orders are compared on it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..training.base_model import BaseModel, computes_bfloat16
from ..tuner.files.atomic import digest_of_folder
from .fingerprint import differences, plain
from .gate import Gate
from .general import General
from .settings import StreamError, listed
from .task import Task

__all__ = [
    "Gate",
    "General",
    "Method",
    "Order",
    "Stream",
    "StreamError",
    "Task",
    "Training",
]


@dataclass(frozen=True)
class Training:
    """How every task is trained, by every method.

    Args:
        epochs: passes over a task's data; a task may have its own.
        max_steps: stop a task after this many steps; goes before epochs.
        batch_size: examples in one forward, on each device.
        gradient_accumulation: forwards before one step.
        learning_rate: highest of the schedule.
        schedule: ``lr_scheduler_type`` of transformers; starts anew with each task.
        warmup_ratio: share of a task's steps.
        weight_decay, max_grad_norm: as in transformers.
        bf16: train and evaluate float32 weights in bfloat16 autocast, as transformers' argument of this name; "auto"
            where the device has it in hardware.
        evaluation_batch_size: prompts that are answered together; as in training if None.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool | str = False
    evaluation_batch_size: int | None = None

    def __post_init__(self) -> None:
        from transformers.trainer_utils import SchedulerType

        numbers = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "learning_rate", "max_grad_norm")
        for name in (*numbers, "evaluation_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise StreamError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.bf16 == "auto":  # settled here, so that a run goes on as it began
            object.__setattr__(self, "bf16", computes_bfloat16())
        if not isinstance(self.bf16, bool):
            raise StreamError(f"bf16 must be true, false or auto, got {self.bf16!r}")
        if not 0 <= self.warmup_ratio <= 1 or self.weight_decay < 0:
            raise StreamError("warmup_ratio must be within 0 and 1 and weight_decay not negative")
        if self.schedule not in (known := [kind.value for kind in SchedulerType]):
            raise StreamError(f"unknown schedule {self.schedule!r}; {listed(self.schedule, known)}")


@dataclass(frozen=True)
class Method:
    """A way to learn the tasks one after another.

    Args:
        name: of the method, such as fggm or sft.
        label: under which its runs are reported; different from that of every other method of the stream.
        settings: of this method, whatever it takes.
    """

    name: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """A name and all tasks in one order."""

    name: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Stream:
    """Everything that a comparison is made of. ``reading.read_stream`` makes one of a file.

    Args:
        model: the base that every run starts from.
        tasks: in the order called "given".
        methods: compared with one another.
        training: the same for all of them.
        learning_rates: every method is run with each; empty: only that of ``training``.
        seeds: of everything that is drawn.
        orders: "given", "reversed", "random:3" (a random order, the same for ever for the seed 3 and these names), or
            a tuple of the tasks' names.
        general: what is watched besides; None for nothing.
        gate: what happens when an earlier task's score falls; None for nothing.

    Raises:
        StreamError: something is empty, there twice, or out of range.
    """

    model: BaseModel
    tasks: tuple[Task, ...]
    methods: tuple[Method, ...]
    training: Training = field(default_factory=Training)
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    orders: tuple[str | tuple[str, ...], ...] = ("given",)
    general: General | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        lists: dict[str, list[Any]] = {
            "tasks": [task.name for task in self.tasks],
            "methods": [method.label for method in self.methods],
            "learning_rates": list(self.learning_rates),
            "seeds": list(self.seeds),
            "orders": [_order_name(order) for order in self.orders],
        }
        for name, values in lists.items():
            if not values and name != "learning_rates":
                raise StreamError(f"{name} is empty; a stream needs at least one")
            if twice := [value for value in values if values.count(value) > 1]:
                hint = "; give them labels of their own" if name == "methods" else ""
                raise StreamError(f"{name} has {twice[0]!r} more than once{hint}")
        if wrong := [rate for rate in self.learning_rates if rate <= 0]:
            raise StreamError(f"learning_rates must be above 0, got {wrong[0]}")
        if wrong := [seed for seed in self.seeds if seed < 0]:
            raise StreamError(f"seeds must not be negative, got {wrong[0]}")
        self.task_orders()
        if self.gate is not None:
            self.gate.require_tasks([task.name for task in self.tasks])

    def with_methods(self, labels: Sequence[str]) -> Stream:
        """The stream with only the methods of these labels.

        Raises:
            StreamError: there is none of such a label.
        """
        by_label = {method.label: method for method in self.methods}
        if unknown := [label for label in labels if label not in by_label]:
            raise StreamError(f"methods: unknown label {unknown[0]!r}; {listed(unknown[0], list(by_label))}")
        return replace(self, methods=tuple(by_label[label] for label in labels))

    def rates(self) -> tuple[float, ...]:
        """The learning rates that every method is run with."""
        return self.learning_rates or (self.training.learning_rate,)

    def training_of(self, task: Task) -> Training:
        """How this task is trained, its own number of epochs included."""
        return self.training if task.epochs is None else replace(self.training, epochs=task.epochs)

    def task_orders(self) -> list[Order]:
        """The tasks in each of ``orders``."""
        return [Order(_order_name(order), self._permuted(order)) for order in self.orders]

    def _permuted(self, order: str | tuple[str, ...]) -> tuple[Task, ...]:
        by_name = {task.name: task for task in self.tasks}
        if not isinstance(order, str):
            if sorted(order) != sorted(by_name):
                raise StreamError(
                    f"orders: {', '.join(order)} is not each task once; the tasks are {', '.join(by_name)}"
                )
            return tuple(by_name[name] for name in order)
        if order == "given":
            return self.tasks
        if order == "reversed":
            return self.tasks[::-1]
        if match := re.fullmatch(r"random:(\d+)", order):
            # by hashes of the names: the same in every version of Python, and wherever a task stands in the file
            return tuple(sorted(self.tasks, key=lambda task: _sha256(f"{match[1]}:{task.name}")))
        raise StreamError(
            f"orders: unknown order {order!r}; known are given, reversed, random:SEED, or a list of all tasks"
        )

    def fingerprint(self) -> dict[str, Any]:
        """Whatever decides the results of every run of this stream, as plain types: files by their content.

        Methods, seeds, orders and learning rates of a sweep are not in it: a run has one of each, and adding another
        leaves those that were there as they are.
        """
        model = asdict(self.model)
        for name in ("device_map", "trust_remote_code"):  # where and whether it is loaded, not what
            del model[name]
        if Path(self.model.name).is_dir():
            model["name"] = digest_of_folder(Path(self.model.name))
        general = None if self.general is None else self.general.fingerprint()
        tasks = {task.name: task.fingerprint() for task in self.tasks}
        training = asdict(self.training)
        gate = None if self.gate is None else asdict(self.gate)
        whole = {"model": model, "tasks": tasks, "training": training, "general": general, "gate": gate}
        return plain({**whole, "order": list(tasks)})

    def digest(self) -> str:
        """sha256 of ``fingerprint``."""
        return _sha256(json.dumps(self.fingerprint(), sort_keys=True))

    def difference(self, other: Stream | Mapping[str, Any]) -> list[str]:
        """What differs from another stream or a fingerprint that was saved: "training.epochs: 1.0, there 3.0".

        Empty if and only if the digests are equal.
        """
        theirs = other.fingerprint() if isinstance(other, Stream) else plain(other)
        return differences(self.fingerprint(), theirs)


def _order_name(order: str | tuple[str, ...]) -> str:
    return order if isinstance(order, str) else ",".join(order)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
