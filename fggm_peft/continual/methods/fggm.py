"""Fisher-guided gradient masking by sparse adapters: the library's own method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import FGGMConfig
from .method import train_all_
from .peft_method import PeftMethod


@dataclass
class FGGM(PeftMethod):
    """FGGM (arXiv 2601.18261): each task trains the units with the highest Fisher information on its data.

    The units are chosen when ``train()`` begins; the sparse delta is saved and merged when the task ends.

    Args:
        first_task_masked: False trains all weights plainly on the first task, which has nothing to forget but the base.
    """

    name = "fggm"
    config_class = FGGMConfig
    first_task_masked: bool = True

    def defaults(self, number):
        return {**super().defaults(number), "seed": self.task_seed(number)}

    @property
    def density(self) -> float | None:
        """That of the config; None where a threshold stands in its place."""
        config: Any = self.make_config(0)
        return config.density

    def make_config(self, number):
        config: Any = super().make_config(number)
        if self.density_scale != 1:
            config.density *= self.density_scale
        return config

    def is_masked(self, number: int) -> bool:
        """Whether only chosen units train in task ``number``."""
        return self.first_task_masked or number > 0

    def begin_task(self, model, number, examples):
        return super().begin_task(model, number, examples) if self.is_masked(number) else train_all_(model)

    def trainer(self, **arguments: Any) -> Trainer:
        is_adapted = isinstance(arguments["model"], PeftModel)
        return FGGMTrainer(**arguments) if is_adapted else super().trainer(**arguments)

    def end_task(self, model, number, trainer, folder):
        return super().end_task(model, number, trainer, folder) if self.is_masked(number) else model
