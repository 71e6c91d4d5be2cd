"""SHiRA: sparse adapters on random entries."""

from __future__ import annotations

from dataclasses import dataclass

from peft import ShiraConfig

from .method import METHODS
from .peft_method import PeftMethod


@METHODS.register("shira")
@dataclass
class SHiRA(PeftMethod):
    """SHiRA (arXiv 2406.13175): a few entries of each weight train, chosen at random for every task.

    PEFT implements the random mask. Without a seed PEFT chooses the same entries every time, so each task has its own
    seed; within a task, weights of the same shape have the same entries.
    """

    config_class = ShiraConfig

    def defaults(self):
        return {**super().defaults(), "random_seed": self.task_seed}
