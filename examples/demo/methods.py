"""The methods that run beside one another: FGGM, and plain fine-tuning of the same layers.

A method knows what is trained and what is kept of a task; the loop around it is the same for all
(``learning.py``). A new method is one class and one line in :data:`METHODS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from base_model import linear_layers
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from fggm_peft import FGGMConfig, select_parameters


@dataclass(frozen=True)
class Selection:
    """What choosing the trainable entries of one task took."""

    seconds: float
    samples: int | None = None
    agreement: float | None = None


class Learner(ABC):
    """One method at work on one model, task after task."""

    model: nn.Module

    def __init__(self, base: PreTrainedModel) -> None:
        self.model = base

    @abstractmethod
    def begin_task(self, loader: DataLoader) -> Selection:
        """Decide what this task may change."""

    @abstractmethod
    def trained_tensors(self) -> list[Tensor]:
        """The float32 tensors that the optimizer moves."""

    def update(self, optimizer: Optimizer) -> None:
        """One optimizer step from the gradients of the last backward."""
        optimizer.step()
        optimizer.zero_grad()

    @abstractmethod
    def end_task(self, folder: Path) -> int:
        """Make the task part of the model; return the bytes that keeping this task takes."""


class FGGMLearner(Learner):
    """Fisher-guided gradient masking as published: rows of highest Fisher, 30 % of each layer."""

    def begin_task(self, loader: DataLoader) -> Selection:
        quantized = any(getattr(self.model, f"is_loaded_in_{b}bit", False) for b in (4, 8))
        config = FGGMConfig(
            target_modules="all-linear",
            density=0.3,
            granularity="row",
            task_type="CAUSAL_LM",
            # A small delta would be rounded away by requantizing: keep it beside the base.
            quantized_merge="keep" if quantized else "auto",
        )
        self.model = get_peft_model(self.model, config)
        report = select_parameters(self.model, loader, num_samples="auto")
        return Selection(report.seconds, report.samples, report.agreement)

    def trained_tensors(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def end_task(self, folder: Path) -> int:
        self.model.save_pretrained(folder, save_embedding_layers=False)
        self.model = self.model.merge_and_unload()
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class PlainLearner(Learner):
    """Plain fine-tuning of all linear layers but the head.

    A bfloat16 weight would swallow most of the small steps, so the optimizer moves float32
    masters, which are rounded into the model after every step.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base.requires_grad_(False))
        self.weights = [layer.weight for layer in linear_layers(base).values()]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(True)

    def begin_task(self, loader: DataLoader) -> Selection:
        return Selection(seconds=0.0)

    def trained_tensors(self) -> list[Tensor]:
        return self.masters

    @torch.no_grad()
    def update(self, optimizer: Optimizer) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.copy_(master)

    def end_task(self, folder: Path) -> int:
        # Nothing sparse to keep: going back to this task needs a copy of every trained weight.
        return sum(weight.numel() * weight.element_size() for weight in self.weights)


@dataclass(frozen=True)
class Method:
    """A learner with its learning rate."""

    name: str
    label: str
    learner: type[Learner]
    learning_rate: float
    why_this_rate: str
    needs_dense_weights: bool


# Rates by final score on seed 0 (one run each): FGGM 1.3e-4 .353, 2e-4 .374, 3e-4 .344; plain 6e-5 .371,
# 1e-4 .438, 2e-4 .389, 3e-4 .261.
METHODS = {
    method.name: method
    for method in (
        Method(
            name="fggm",
            label="FGGM",
            learner=FGGMLearner,
            learning_rate=2e-4,
            why_this_rate="the best of three tried: only three rows in ten move",
            needs_dense_weights=False,
        ),
        Method(
            name="plain",
            label="plain",
            learner=PlainLearner,
            learning_rate=1e-4,
            why_this_rate="the best of four tried: every weight moves, so each must move less",
            needs_dense_weights=True,
        ),
        Method(
            name="plain-same-rate",
            label="plain, same rate",
            learner=PlainLearner,
            learning_rate=2e-4,
            why_this_rate="FGGM's rate, for a comparison at one shared rate",
            needs_dense_weights=True,
        ),
    )
}
