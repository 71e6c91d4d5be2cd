"""LoRA, with one adapter for the stream or one for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peft import LoraConfig

from ...core.registry import require_one_of
from .method import METHODS
from .peft_method import PeftMethod

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
        require_one_of("mode", self.mode, get_args(Mode))
        super().__post_init__()

    def prepare(self, base, seed):
        base = super().prepare(base, seed)
        return self.wrap(base) if self.mode == "carried" else base

    def begin_task(self, model, examples):
        return model if self.mode == "carried" else super().begin_task(model, examples)

    def end_task(self, model, trainer, folder):
        if self.mode == "merged":
            return super().end_task(model, trainer, folder)
        self.save(model, trainer, folder)
        return model
