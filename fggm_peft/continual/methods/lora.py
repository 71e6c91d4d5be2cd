"""LoRA, with one adapter for the stream or one for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peft import LoraConfig

from .method import METHODS
from .peft_method import PeftMethod, save_task

Mode = Literal["merged", "carried"]


@METHODS.register("lora")
@dataclass
class LoRA(PeftMethod):
    """LoRA (arXiv 2106.09685): W + BA, where A and B train.

    Args:
        mode: "merged": every task has its own adapter, which is merged when the task ends. "carried": one adapter
            trains on all tasks, and the base model never changes.
    """

    config_class = LoraConfig
    mode: Mode = "merged"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(Mode)))}, got {self.mode!r}")
        super().__post_init__()

    def prepare(self, base, seed):
        base = super().prepare(base, seed)
        return self.wrap(base, 0) if self.mode == "carried" else base

    def begin_task(self, model, number, examples):
        return model if self.mode == "carried" else super().begin_task(model, number, examples)

    def end_task(self, model, number, trainer, folder):
        if self.mode == "merged":
            return super().end_task(model, number, trainer, folder)
        save_task(model, trainer, folder)
        return model
