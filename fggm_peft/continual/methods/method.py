"""The interface of a method that learns a stream of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...core import Registry

Examples = Sequence[Mapping[str, Sequence[int]]]
"""Tokenized training data of a task: ``TokenizedExamples``, or a list of such rows."""


@dataclass
class Method(ABC):
    """A method that learns a stream of tasks. Its options are its dataclass fields.

    The runner calls ``prepare`` once, and for each task ``begin_task``, ``trainer(...).train()`` and ``end_task``; it
    evaluates the model that ``end_task`` returns. Tasks are numbered from 0. Between tasks the model has the modules
    that it had after ``prepare``: its ``state_dict`` and that of the method, loaded after ``prepare``, resume a run
    exactly.

    Attributes:
        name: the name in the registry, which sets it.
        sees_all_tasks: the method receives the data of all tasks at once, as task 0.
        trains: if False, there is no trainer, and ``end_task`` receives None.
    """

    name: ClassVar[str]
    sees_all_tasks: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    seed: int = field(default=0, init=False, repr=False)

    @classmethod
    def option_names(cls) -> list[str]:
        """The legal names of ``from_options``."""
        return [option.name for option in fields(cls) if option.init]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """The method with these options.

        Raises:
            ValueError: an option is unknown; the message lists the legal ones.
        """
        legal = cls.option_names()
        for name in options:
            if name not in legal:
                listed = f"legal are {', '.join(legal)}" if legal else "it has none"
                raise ValueError(f"the method {cls.name!r} has no option {name!r}; {listed}")
        return cls(**options)

    def prepare(self, base: nn.Module, seed: int) -> nn.Module:
        """The model to train, wrapped or not; called once, also when a run is resumed."""
        self.seed = seed
        return base

    @abstractmethod
    def begin_task(self, model: nn.Module, number: int, examples: Examples) -> nn.Module:
        """The model to train on task ``number``, with ``requires_grad`` set on its parameters."""

    def trainer(self, **arguments: Any) -> Trainer:
        """A trainer for the current task; the arguments are those of transformers' ``Trainer``."""
        return Trainer(**arguments)

    def end_task(self, model: nn.Module, number: int, trainer: Trainer | None, folder: Path | None) -> nn.Module:
        """The model for the evaluation and the next task.

        Args:
            trainer: has trained task ``number``.
            folder: the task's delta is saved there if the method has one.
        """
        return model

    def state_dict(self) -> dict[str, Tensor]:
        """State that the method itself needs in later tasks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of ``state_dict``.

        Raises:
            ValueError: the method has no state, but ``state`` is not empty.
        """
        if state:
            raise ValueError(f"the method {self.name!r} has no state, but got {', '.join(state)}")

    def task_seed(self, number: int) -> int:
        """A seed for the random draws of task ``number``, the same when a run is resumed."""
        return (self.seed * 0x9E3779B1 + number) % 2**32

    @contextmanager
    def randomness_of(self, number: int) -> Iterator[None]:
        """Seed torch with ``task_seed`` inside the block, and restore its random state after it."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.task_seed(number))
            yield


METHODS: Registry[type[Method]] = Registry("method", named=True)


def train_all_(model: nn.Module) -> nn.Module:
    """Make every parameter trainable.

    Raises:
        ValueError: the model is quantized.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"full fine-tuning needs a dense model, and {name} is {parameter.dtype}. Load the model without "
                "quantization, or train an adapter (fggm, lora)"
            )
    return model.requires_grad_(True)


def train_only_(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Make only the named parameters trainable."""
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model
