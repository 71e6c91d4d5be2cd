"""The result of a merge: how much of each delta is in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.weight_delta import WeightDelta


@dataclass(frozen=True)
class ModuleMerge:
    """What a merge did, or would do, to the delta of one module.

    Args:
        delta_norm: Frobenius norm of the delta.
        projection: inner product of the weight's actual change with the delta.
        error_norm: Frobenius norm of (actual change - delta).
        outcome: "added", "requantized" or "kept".
        name: module path.
    """

    delta_norm: float
    projection: float
    error_norm: float
    outcome: str
    name: str = ""

    @property
    def survived(self) -> float:
        """Share of the delta that is in the weight: the projection of the weight's change on the delta."""
        return self.projection / self.delta_norm**2 if self.delta_norm else 1.0


@dataclass(frozen=True)
class MergeReport:
    """What a merge did to the deltas of all modules."""

    modules: list[ModuleMerge]

    @property
    def survived(self) -> float:
        """Share of the whole delta that is in the weights."""
        return total(self.modules).survived if self.modules else 1.0

    def to_dict(self) -> dict[str, Any]:
        modules = {m.name: {**asdict(m), "survived": m.survived} for m in self.modules}
        return {"survived": self.survived, "modules": modules}

    def __str__(self) -> str:
        outcomes = sorted({m.outcome for m in self.modules})
        counts = ", ".join(f"{sum(m.outcome == o for m in self.modules)} {o}" for o in outcomes)
        return f"MergeReport({len(self.modules)} modules: {counts or 'nothing merged'}; {self.survived:.2%} survived)"


def compare(change: Tensor, delta: Tensor, outcome: str) -> ModuleMerge:
    """Compare the actual change of a weight with the exact delta, entry by entry, in the dtype of both."""
    change, delta = change.flatten(), delta.flatten()
    error = change - delta
    square, projection, error_square = torch.stack([delta.dot(delta), change.dot(delta), error.dot(error)]).tolist()
    return ModuleMerge(square**0.5, projection, error_square**0.5, outcome)


def unchanged(deltas: Sequence[WeightDelta]) -> ModuleMerge:
    """The record of deltas in a sidecar, which are exact."""
    square = sum(float((delta.values.detach() * delta.scale).double().square().sum()) for delta in deltas)
    return ModuleMerge(square**0.5, square, 0.0, "kept")


def total(records: Sequence[ModuleMerge]) -> ModuleMerge:
    """The records of several deltas as one."""
    return ModuleMerge(
        delta_norm=sum(r.delta_norm**2 for r in records) ** 0.5,
        projection=sum(r.projection for r in records),
        error_norm=sum(r.error_norm**2 for r in records) ** 0.5,
        outcome=records[0].outcome,
    )
