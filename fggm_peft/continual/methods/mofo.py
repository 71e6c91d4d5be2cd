"""MoFO: AdamW that changes only the entries with the largest momentum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from .method import METHODS, Method


@METHODS.register("mofo")
@dataclass
class MoFO(Method):
    """MoFO (arXiv 2407.20999, algorithm 1): each step changes the entries of each weight with the largest momentum.

    Each weight is a block. AdamW updates its moments as usual; then the entries change whose first moment is among the
    top ``fraction`` of the block in magnitude. Biases and norms change completely, and weight decay applies to all
    entries, as in the authors' code.

    Memory: a copy of the weights during each optimizer step.

    Args:
        fraction: share of the entries that change in a step, in (0, 1]. The authors recommend 0.05 to 0.2.
    """

    fraction: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction!r}")

    def change_optimizer_(self, optimizer):
        before: dict[Tensor, Tensor] = {}

        def copy(optimizer: Optimizer, *_) -> None:
            before.update(
                (weight, weight.detach().clone())
                for group in optimizer.param_groups
                for weight in group["params"]
                if weight.dim() > 1 and weight.grad is not None
            )

        @torch.no_grad()
        def filter_(optimizer: Optimizer, *_) -> None:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    if weight in before:
                        is_largest = largest(optimizer.state[weight]["exp_avg"], self.fraction)
                        decayed = before[weight] * (1 - group["lr"] * group["weight_decay"])
                        weight.copy_(torch.where(is_largest, weight, decayed))
            before.clear()

        optimizer.register_step_pre_hook(copy)
        optimizer.register_step_post_hook(filter_)


def largest(momentum: Tensor, fraction: float) -> Tensor:
    """True for the top ``fraction`` of the entries in magnitude, at least one, and its ties."""
    magnitude = momentum.abs()
    count = max(1, int(fraction * magnitude.numel()))
    return magnitude >= magnitude.flatten().kthvalue(magnitude.numel() - count + 1).values
