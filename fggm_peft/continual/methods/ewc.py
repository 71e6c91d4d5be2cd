"""Elastic weight consolidation: a penalty on changing the weights that earlier tasks need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...selection import linear_layers
from ...selection.likelihood import IGNORED
from .method import METHODS, Method, train_only_


@METHODS.register("ewc")
@dataclass
class EWC(Method):
    """Online EWC (arXiv 1612.00796; the online form: Progress & Compress, arXiv 1805.06370).

    It adds ``penalty / 2 * sum F * (theta - theta*)^2`` to the loss, with theta* the weights at the start of the task.
    After each task ``F <- decay * F + F_task``, where F_task is the diagonal empirical Fisher information: the mean
    over samples of the squared gradient of a sample's log-likelihood, summed over its answer's tokens. ``memory`` is
    F by parameter name.

    Only the weights of the linear layers train. Embeddings, norms, biases and the head are frozen, because nothing
    would penalize their changes.

    Memory: 4 bytes for each trained weight (F in float32), the size of the weights while a task trains (theta*), and 4
    bytes for each weight while F_task is computed.

    Args:
        penalty: the paper's lambda. No default suits all tasks; tune it together with the learning rate.
        decay: gamma of the online form, in [0, 1].
        num_samples: samples for F_task; None for all samples of the task.
    """

    penalty: float = 1.0
    decay: float = 1.0
    num_samples: int | None = None
    _anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1 or None, got {self.num_samples!r}")
        if self.penalty < 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"EWC needs penalty >= 0 and decay in [0, 1], got {self.penalty!r} and {self.decay!r}")

    def begin_task(self, model, examples):
        self._anchor = {name: p.detach().clone() for name, p in model.named_parameters() if name in self.memory}
        return train_only_(model, [f"{name}.weight" for name in linear_layers(model)])

    def penalties(self, model):
        for name, anchor in self._anchor.items():
            weight = model.get_parameter(name)
            change = weight.float() - anchor.float()
            yield self.penalty / 2 * (self.memory[name].to(weight.device) * change.square()).sum()

    def end_task(self, model, trainer, folder):
        self._anchor = {}
        for name, fisher in self._task_fisher(model, trainer).items():
            if name in self.memory:
                fisher += self.decay * self.memory[name].to(fisher.device)
            self.memory[name] = fisher
        return model

    def _task_fisher(self, model: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
        """Parameter name -> F of the trainer's data, float32, in the weight's shape."""
        data: Any = trainer.train_dataset
        count = len(data) if self.num_samples is None else min(self.num_samples, len(data))
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fisher = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
        model.eval()
        for index in range(count):
            batch = {key: value.to(model.device) for key, value in trainer.data_collator([data[index]]).items()}
            tokens = (batch["labels"][:, 1:] != IGNORED).sum()
            gradients = torch.autograd.grad(model(**batch).loss * tokens, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                fisher[name].add_(gradient.float().square(), alpha=1 / count)
        return fisher
