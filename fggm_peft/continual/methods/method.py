"""What the harness asks of a way to learn a stream of tasks."""

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

from ...core.registry import Registry

Examples = Sequence[Mapping[str, Sequence[int]]]
"""A task's training data as a model takes it: ``TokenizedExamples``, or a list of such rows."""


@dataclass
class Method(ABC):
    """One way of learning a stream of tasks. Its options are its dataclass fields.

    The harness calls ``prepare`` once, and for each task ``begin_task``, ``trainer(...).train()`` and ``end_task``; the
    model that ``end_task`` returns is evaluated. Tasks are numbered from 0. Between tasks the model has the modules
    that ``prepare`` gave it: its ``state_dict`` and the method's, loaded after ``prepare``, resume a run to the bit.

    Attributes:
        name: the name in the registry, which sets it.
        sees_all_tasks: the harness gives it the data of all tasks at once, as task 0.
        trains: without it, the harness makes no trainer and calls ``end_task`` with None.
    """

    name: ClassVar[str]
    sees_all_tasks: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    seed: int = field(default=0, init=False, repr=False)

    @classmethod
    def option_names(cls) -> list[str]:
        """What ``from_options`` takes."""
        return [option.name for option in fields(cls) if option.init]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """The method with these options.

        Raises:
            ValueError: one is unknown; the message lists the known ones.
        """
        known = cls.option_names()
        for name in options:
            if name not in known:
                listed = f"known are {', '.join(known)}" if known else "it has none"
                raise ValueError(f"the method {cls.name!r} has no option {name!r}; {listed}")
        return cls(**options)

    def prepare(self, base: nn.Module, seed: int) -> nn.Module:
        """The model that will be trained, wrapped or not; called once, also when a run is resumed."""
        self.seed = seed
        return base

    @abstractmethod
    def begin_task(self, model: nn.Module, number: int, examples: Examples) -> nn.Module:
        """The model to train on task ``number``; sets which of its parameters do."""

    def trainer(self, **arguments: Any) -> Trainer:
        """A trainer for the task that has begun; the arguments are those of transformers' ``Trainer``."""
        return Trainer(**arguments)

    def end_task(self, model: nn.Module, number: int, trainer: Trainer | None, folder: Path | None) -> nn.Module:
        """The model that goes on.

        Args:
            trainer: has trained task ``number``.
            folder: the task's delta is saved there if the method has one.
        """
        return model

    def state_dict(self) -> dict[str, Tensor]:
        """What the method itself remembers between tasks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ValueError: the method remembers nothing, and this is something.
        """
        if state:
            raise ValueError(f"the method {self.name!r} remembers nothing, but its state has {', '.join(state)}")

    def task_seed(self, number: int) -> int:
        """A seed for what is drawn in task ``number``, the same when a run is resumed."""
        return (self.seed * 0x9E3779B1 + number) % 2**32

    @contextmanager
    def randomness_of(self, number: int) -> Iterator[None]:
        """Within, torch draws by ``task_seed``; afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.task_seed(number))
            yield


METHODS: Registry[type[Method]] = Registry("method", named=True)


def train_all_(model: nn.Module) -> nn.Module:
    """Let every parameter train.

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
    """Let the named parameters train, and no others."""
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model
