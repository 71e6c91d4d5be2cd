"""Base class of the methods that train a PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import Trainer

from ...deltas import save_adapter
from .method import Examples, Method

WRITTEN_BY_PEFT = {field.name for field in fields(PeftConfig)} - {"task_type"}
DEFAULTS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


@dataclass
class PeftMethod(Method):
    """A new adapter for every task; it is saved and merged when the task ends.

    Args:
        config: fields of the adapter's config; ``DEFAULTS`` apply to fields that it does not contain. ``make_method``
            also takes these fields as options.
    """

    config_class: ClassVar[type[PeftConfig]]
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.make_config(0)  # raises an error for an illegal option now, not after hours

    @classmethod
    def option_names(cls) -> list[str]:
        of_config = [option.name for option in fields(cls.config_class) if option.init]
        names = [*super().option_names(), *(name for name in of_config if name not in WRITTEN_BY_PEFT)]
        return list(dict.fromkeys(names))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        of_config = set(cls.option_names()) - {option.name for option in fields(cls) if option.init}
        config = {name: value for name, value in options.items() if name in of_config}
        own = {name: value for name, value in options.items() if name not in of_config}
        return super().from_options({**own, "config": {**own.get("config", {}), **config}})

    def defaults(self, number: int) -> dict[str, Any]:
        """Fields of task ``number``'s config that ``config`` overrides."""
        return dict(DEFAULTS)

    def make_config(self, number: int) -> PeftConfig:
        """A new config for task ``number``'s adapter; PEFT modifies it."""
        return self.config_class(**{**self.defaults(number), **copy.deepcopy(self.config)})

    def wrap(self, model: nn.Module, number: int) -> nn.Module:
        """The model with task ``number``'s adapter."""
        with self.randomness_of(number):
            return get_peft_model(model, self.make_config(number))  # type: ignore[arg-type]

    def begin_task(self, model, number, examples: Examples):
        return self.wrap(model, number)

    def end_task(self, model, number, trainer: Trainer | None, folder: Path | None):
        save_task(model, trainer, folder)
        return model.merge_and_unload()


def save_task(model: Any, trainer: Trainer | None, folder: Path | None) -> None:
    """Save the adapter in the folder, if there is one, from the main process."""
    if folder is not None:
        is_main = trainer is None or trainer.is_world_process_zero()
        # "auto" would query the Hub for a resized vocabulary
        save_adapter(model, folder, is_main, save_embedding_layers=False)
