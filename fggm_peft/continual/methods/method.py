"""The base class of the methods that learn a stream of tasks, and the trainer that they use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from ...core import Registry
from ...retention import HarmDecay
from ...selection import input_covariance, linear_layers
from ...selection.input_covariance import COVARIANCE_SAMPLES, input_widths
from ...selection.reference import covariance_to_retain, is_text_file, own_text
from ...training.answer_loss import AnswerLossMixin
from ...training.texts import read_paragraphs, with_texts
from ...tuner import InputCovariance
from ...tuner.settings.fields import require_types
from ..settings import suggestions

RETAINED = "retained"
"""Key of the sum of the earlier tasks' input covariances in a method's memory."""
Examples = Sequence[Mapping[str, Sequence[int]]]
"""Tokenized training data of a task: ``TokenizedExamples``, or a list of such rows."""


@dataclass
class Method:
    """A method that learns a stream of tasks. Its options are its dataclass fields.

    This class fine-tunes all weights, and a subclass overrides some of its steps. The runner calls ``prepare`` once.
    For each task it sets ``number`` and calls ``begin_task``, ``trainer(...).train()`` and ``end_task``, and evaluates
    the model that ``end_task`` returns. Between tasks the model has the modules that it had after ``prepare``: its
    ``state_dict`` and ``memory``, restored after ``prepare``, resume a run exactly.

    Args:
        harm_decay: strength of harm decay (docs/retention.md) of what the method trains in linear layers; 0 for none.
        reference: what the model should retain, as in ``FGGMConfig``: text files (.txt), "history" (earlier tasks),
            "self", or saved statistics.

    Attributes:
        name: the name in the registry, which sets it.
        sees_all_tasks: the method receives the data of all tasks at once, as task 0.
        trains: if False, there is no trainer, and ``end_task`` receives None.
        seed: of all random draws of the run.
        number: of the current task, from 0.
        memory: what later tasks need: tensors and plain types, saved between tasks.
    """

    name: ClassVar[str]
    sees_all_tasks: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    harm_decay: float = 0.0
    reference: list[str] = field(default_factory=list)
    seed: int = field(default=0, init=False, repr=False)
    number: int = field(default=0, init=False, repr=False)
    memory: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.reference = [self.reference] if isinstance(self.reference, str) else list(self.reference or [])
        require_types(self)
        if not 0 <= self.harm_decay < math.inf:
            raise ValueError(f"harm_decay must be a number >= 0, got {self.harm_decay!r}")
        if self.uses_reference and not self.reference:
            raise ValueError("what should the model retain? Set reference to a text file (.txt), 'history', or both")
        if self.reference and not self.uses_reference:
            raise ValueError("reference is for harm_decay; set harm_decay too, or remove reference")
        require_texts(self.reference)

    @property
    def uses_reference(self) -> bool:
        """Whether it reads the reference."""
        return self.harm_decay > 0

    @property
    def supports_quantized(self) -> bool:
        """Whether the base model may be quantized, because the method does not change its weights."""
        return False

    @property
    def recommended_learning_rate(self) -> float | None:
        """Used if a stream sets no learning rate; None if the method recommends none."""
        return None

    @classmethod
    def option_names(cls) -> list[str]:
        """The options that ``make_method`` takes."""
        return [option.name for option in fields(cls) if option.init]

    def prepare(self, base: nn.Module, seed: int) -> nn.Module:
        """The model to train, wrapped or not; called once, also when a run is resumed."""
        self.seed = seed
        return base

    def begin_task(self, model: nn.Module, examples: Examples) -> nn.Module:
        """The model to train on the current task, with ``requires_grad`` set on its parameters.

        All of them train. With harm decay only the weights of linear layers do, because nothing retains the others.
        """
        if self.harm_decay:
            return train_only_(model, [f"{name}.weight" for name in linear_layers(model)])
        return model.requires_grad_(True)

    def trainer(self, **arguments: Any) -> Trainer:
        """A trainer for the current task; the arguments are those of transformers' ``Trainer``."""
        return MethodTrainer(self, **arguments)

    def covariance(self, trainer: Trainer) -> InputCovariance | None:
        """Of the inputs to retain, on the model before the current task; None if the method does not use it."""
        if not self.uses_reference:
            return None
        model: Any = trainer.model
        tokenizer: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        entries = with_texts(self.reference, tokenizer)
        saved = self.memory.get(RETAINED)
        history = None if saved is None else InputCovariance.from_dict(saved)
        with trainer.accelerator.autocast():
            if "self" in self.reference:
                text = own_text(model, self.task_seed)
                entries = [text if isinstance(entry, str) and entry == "self" else entry for entry in entries]
            return covariance_to_retain(model, entries, input_widths(model), history)

    def remember_task(self, trainer: Trainer) -> None:
        """Add the task to ``memory`` if the reference contains "history"; called when the model has learned it."""
        if "history" in self.reference:
            saved = self.memory.get(RETAINED)
            with trainer.accelerator.autocast():
                own = self.task_covariance(trainer)
            self.memory[RETAINED] = (own if saved is None else InputCovariance.from_dict(saved) + own).to_dict()

    def task_covariance(self, trainer: Trainer) -> InputCovariance:
        """The input covariance of the current task's data, on the CPU."""
        model: Any = trainer.model
        data: Any = trainer.train_dataset
        accelerator = trainer.accelerator
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.task_seed))[:COVARIANCE_SAMPLES]
        own = Subset(data, order[accelerator.process_index :: accelerator.num_processes].tolist())
        batches = DataLoader(own, batch_size=8, collate_fn=trainer.data_collator)
        return input_covariance(model, batches).to("cpu")

    def penalties(self, model: nn.Module) -> Iterable[Tensor]:
        """Terms that are added to the loss. Only the intermediate results of one term are in memory at a time."""
        return ()

    def change_gradients_(self, model: nn.Module, trainer: Trainer) -> None:
        """Called once per step, after the backward pass of its last batch and before the gradients are clipped."""
        scaler = trainer.accelerator.scaler  # for float16, in which the other gradients are scaled
        for term in self.penalties(model):
            (term if scaler is None else scaler.scale(term)).backward()

    def change_optimizer_(self, optimizer: Optimizer) -> None:
        """Called once per task, with the new optimizer; for hooks before harm decay."""

    def end_task(self, model: nn.Module, trainer: Trainer | None, folder: Path | None) -> nn.Module:
        """The model for the evaluation and the next task.

        Args:
            trainer: has trained the current task.
            folder: the task's delta is saved there if the method has one.
        """
        return model

    @property
    def task_seed(self) -> int:
        """A seed for the random draws of the current task, the same when a run is resumed."""
        return (self.seed * 0x9E3779B1 + self.number) % 2**32


METHODS: Registry[type[Method]] = Registry("method", named=True)


def require_texts(reference: Iterable[Any]) -> None:
    """Raise an error for a missing or empty text now, not after hours."""
    for file in filter(is_text_file, [reference] if isinstance(reference, str) else reference):
        read_paragraphs(file)


def make_method(name: str, /, **options: Any) -> Method:
    """The method registered under ``name``.

    Args:
        options: its dataclass fields; for a method that trains a PEFT adapter, also the fields of the adapter's config.

    Raises:
        ValueError: the method or an option is unknown (the message lists the legal ones), or a value is illegal.
    """
    method, legal = METHODS[name], METHODS[name].option_names()
    for option in options:
        if option not in legal:
            hint = suggestions(option, legal) if legal else "it has none"
            raise ValueError(f"the method {name!r} has no option {option!r}; {hint}")
    own = {option.name for option in fields(method) if option.init}
    config = {option: options.pop(option) for option in list(options) if option not in own}
    if config:
        options["config"] = config
    try:
        return method(**options)
    except TypeError as error:  # a value of a wrong type
        raise ValueError(f"the method {name!r}: {error}") from error


class MethodTrainer(AnswerLossMixin, Trainer):
    """transformers' ``Trainer``, in which a method changes the gradients of each step, with the method's harm decay.

    It does not support DeepSpeed, which does not keep gradients on the parameters.

    Attributes:
        covariance: of the inputs to retain; None if the method does not use it.
        harm_decay: attached to the optimizer until training ends; None if the method has none.
    """

    def __init__(self, method: Method, **arguments: Any):
        super().__init__(**arguments)
        self.method = method
        self.covariance = method.covariance(self)
        self.harm_decay: HarmDecay | None = None
        if method.harm_decay and self.covariance is not None:
            # attached now, because weights decay to what they are before a checkpoint is loaded
            trained: Any = self.model
            self.harm_decay = HarmDecay(self.covariance, method.harm_decay).attach(trained, self.create_optimizer())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            self.method.change_optimizer_(optimizer)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
            self.method.remember_task(self)
            return result
        finally:
            if self.harm_decay is not None:
                self.harm_decay.remove()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.method.change_gradients_(self.accelerator.unwrap_model(self.model), self)
        return loss


def train_only_(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Make only the named parameters trainable."""
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model
