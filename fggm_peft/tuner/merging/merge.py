"""Merging sparse deltas into weights, and the report of what a merge did.

A dense weight gets a delta in place: added in float32, rounded once, with the changed entries saved so that unmerging
restores them bit for bit. A quantized layer is replaced by a new layer, and unmerging puts the old one back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import LossyMergeError
from ...core.granularity import sum_rounded_once
from ...core.weight_delta import WeightDelta

MIN_SURVIVAL = 0.95
"""Share of a delta that must survive requantization with ``quantized_merge="auto"``."""


@dataclass(frozen=True)
class ModuleMerge:
    """What a merge did, or would do, to the delta of one module.

    Args:
        delta_norm: Frobenius norm of the delta.
        projection: inner product of the weight's actual change with the delta.
        outcome: "added", "requantized" or "kept".
        name: module path.
    """

    delta_norm: float
    projection: float
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
    square, projection = torch.stack([delta.dot(delta), change.dot(delta)]).tolist()
    return ModuleMerge(square**0.5, projection, outcome)


def unchanged(deltas: Sequence[WeightDelta]) -> ModuleMerge:
    """The record of deltas in a sidecar, which are exact."""
    square = sum(float((delta.values.detach() * delta.scale).double().square().sum()) for delta in deltas)
    return ModuleMerge(square**0.5, square, "kept")


def total(records: Sequence[ModuleMerge]) -> ModuleMerge:
    """The records of several deltas as one."""
    return ModuleMerge(
        delta_norm=sum(r.delta_norm**2 for r in records) ** 0.5,
        projection=sum(r.projection for r in records),
        outcome=records[0].outcome,
    )


def add_to_dense_(matrix: Tensor, delta: WeightDelta) -> tuple[Tensor, Tensor]:
    """Add a delta to a weight ``[o, i]`` in place; returns the changed entries before and after."""
    before = delta.granularity.gather(matrix, delta.indices)
    after = sum_rounded_once(before, delta.values.detach(), delta.scale)
    delta.granularity.put_(matrix, delta.indices, after)
    return before, after


def record_of(delta: WeightDelta, before: Tensor, after: Tensor) -> ModuleMerge:
    """The record of a delta that was added to a dense weight."""
    wide = torch.promote_types(after.dtype, torch.float32)
    return compare(after.to(wide) - before.to(wide), delta.values.detach().to(wide) * delta.scale, "added")


def not_finite_error(adapter_name: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


def require_requantizable(backend: Any) -> None:
    """Raise ``TypeError`` unless PEFT's quantization backend can read and write weights."""
    if not backend.supports_merge:
        raise TypeError(
            f"{backend.backend_name} layers cannot be requantized. Set quantized_merge='keep' on the config."
        )


def requantized(base: nn.Module, backend: Any, weight: Tensor) -> nn.Module:
    """A copy of a quantized layer with another weight ``[o, i]``, quantized in the same way."""
    layer = copy.deepcopy(base)  # backends write to the layer and to attributes of its weight
    holder = SimpleNamespace(base_layer=layer)
    holder.get_base_layer = lambda: holder.base_layer  # HQQ's backend replaces the layer of its holder
    backend.set_base_weight(holder, weight)
    return holder.base_layer.train(base.training)


def lossy_merge_error(report: MergeReport) -> LossyMergeError:
    """The error of mode "auto", with the surviving share and the alternatives."""
    return LossyMergeError(
        f"requantizing the merged weights would keep {report.survived:.1%} of the delta, less than the "
        f"{MIN_SURVIVAL:.0%} that quantized_merge='auto' requires. Nothing was changed. Set quantized_merge on the "
        "adapter's config to 'keep' (an exact sidecar) or 'requantize', or load the base unquantized."
    )
