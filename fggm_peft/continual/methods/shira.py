"""Sparse adapters at random places."""

from __future__ import annotations

from dataclasses import dataclass

from peft import ShiraConfig

from .method import METHODS
from .peft_method import PeftMethod


@METHODS.register("shira")
@dataclass
class SHiRA(PeftMethod):
    """SHiRA (arXiv 2406.13175): a few entries of each weight train, chosen at random anew for every task.

    The random kind of mask is the one that PEFT has. Without a seed PEFT draws the same places every time, so each task
    has a seed of its own; weights of one shape still have the same places within a task.
    """

    config_class = ShiraConfig

    def defaults(self, number):
        return {**super().defaults(number), "random_seed": self.task_seed(number)}
