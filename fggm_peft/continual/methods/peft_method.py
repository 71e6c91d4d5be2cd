"""What methods have in common that train an adapter of PEFT."""

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


@dataclass
class PeftMethod(Method):
    """A fresh adapter for every task, which is saved and merged when the task ends.

    Args:
        config: what the adapter's config is made of. ``task_type`` is CAUSAL_LM and ``target_modules`` "all-linear"
            if it does not say otherwise. ``make_method`` takes these as options of their own.
    """

    config_class: ClassVar[type[PeftConfig]]
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.make_config(0)  # a bad option is an error now, not when the run has begun

    @classmethod
    def option_names(cls) -> list[str]:
        of_config = [option.name for option in fields(cls.config_class) if option.init]
        names = [*super().option_names(), *(name for name in of_config if name not in WRITTEN_BY_PEFT)]
        return list(dict.fromkeys(names))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        names = set(cls.option_names()) - {option.name for option in fields(cls) if option.init}
        of_config = {name: value for name, value in options.items() if name in names}
        own = {name: value for name, value in options.items() if name not in names}
        return super().from_options({**own, "config": {**own.get("config", {}), **of_config}})

    def make_config(self, number: int) -> PeftConfig:
        """The config of task ``number``'s adapter, a new one each time, since PEFT writes into it."""
        return self.config_class(**{**self.defaults(number), **copy.deepcopy(self.config)})

    def defaults(self, number: int) -> dict[str, Any]:
        """What task ``number``'s config has unless ``config`` says otherwise."""
        return {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}

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
    """Save the adapter from the main process, if there is a folder for it."""
    if folder is not None:
        is_main = trainer is None or trainer.is_world_process_zero()
        # "auto" would ask the Hub whether the vocabulary has been resized
        save_adapter(model, folder, is_main, save_embedding_layers=False)
