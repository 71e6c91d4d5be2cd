"""Base class of the methods that train a PEFT adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from peft import PeftConfig, get_peft_model
from torch import nn

from ...deltas import save_adapter
from .method import Method

WRITTEN_BY_PEFT = {field.name for field in fields(PeftConfig)} - {"task_type"}
DEFAULTS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


@dataclass
class PeftMethod(Method):
    """A new adapter for every task; it is saved and merged when the task ends.

    Args:
        config: fields of the adapter's config; ``defaults`` apply to the others. ``make_method`` takes these fields
            as options.
    """

    config_class: ClassVar[type[PeftConfig]]
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.make_config()  # raises an error for an illegal option now, not after hours

    @classmethod
    def option_names(cls) -> list[str]:
        of_config = [option.name for option in fields(cls.config_class) if option.init]
        names = [*super().option_names(), *(name for name in of_config if name not in WRITTEN_BY_PEFT)]
        return [name for name in dict.fromkeys(names) if name != "config"]

    def defaults(self) -> dict[str, Any]:
        """Fields of the current task's config that ``config`` overrides."""
        return dict(DEFAULTS)

    def make_config(self) -> PeftConfig:
        """A new config for the current task's adapter; PEFT modifies it."""
        return self.config_class(**{**self.defaults(), **copy.deepcopy(self.config)})

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with the current task's adapter."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.task_seed)
            return get_peft_model(model, self.make_config())  # type: ignore[arg-type]

    def begin_task(self, model, examples):
        return self.wrap(model)

    def end_task(self, model, trainer, folder):
        self.save(model, trainer, folder)
        return model.merge_and_unload()

    @staticmethod
    def save(model, trainer, folder):
        """Save the adapter in the folder, if there is one, from the main process."""
        if folder is not None:
            is_main = trainer is None or trainer.is_world_process_zero()
            # "auto" would query the Hub for a resized vocabulary
            save_adapter(model, folder, is_main, save_embedding_layers=False)
