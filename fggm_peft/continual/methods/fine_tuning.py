"""Reference methods: plain fine-tuning, all tasks at once, and no training."""

from __future__ import annotations

from dataclasses import dataclass, field

from .method import METHODS, Method


@METHODS.register("sft")
@dataclass
class FineTuning(Method):
    """Sequential full fine-tuning: all weights train on one task after another."""


@METHODS.register("multitask")
@dataclass
class MultiTask(FineTuning):
    """Full fine-tuning on the data of all tasks at once: an upper reference, because a stream does not offer this."""

    sees_all_tasks = True


@METHODS.register("frozen")
@dataclass
class Frozen(Method):
    """The base model without training: a lower reference."""

    trains = False
    harm_decay: float = field(default=0.0, init=False, repr=False)  # nothing decays
    reference: list[str] = field(default_factory=list, init=False, repr=False)

    @property
    def supports_quantized(self):
        return True

    def begin_task(self, model, examples):
        return model.requires_grad_(False)
