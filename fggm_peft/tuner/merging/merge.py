"""Merging sparse deltas into weights.

A dense weight gets a delta in place: added in float32, rounded once, with the changed entries saved so that unmerging
restores them bit for bit. A quantized layer is replaced by a new layer, and unmerging puts the old one back.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import LossyMergeError
from ...core.granularity import sum_rounded_once
from ...core.weight_delta import WeightDelta
from .report import MergeReport, ModuleMerge, compare

MIN_SURVIVAL = 0.95
"""Share of a delta that must survive requantization with ``quantized_merge="auto"``."""


def add_to_dense_(matrix: Tensor, delta: WeightDelta, keep_originals: bool) -> tuple[ModuleMerge, Tensor | None]:
    """Add a delta to a weight ``[o, i]`` in place; returns a record and, if they are kept, the original entries."""
    granularity, values = delta.granularity, delta.values.detach()
    wide = torch.promote_types(matrix.dtype, torch.float32)
    before = granularity.gather(matrix, delta.indices)
    after = sum_rounded_once(before, values, delta.scale)
    granularity.put_(matrix, delta.indices, after)
    report = compare(after.to(wide) - before.to(wide), values.to(wide) * delta.scale, "added")
    return report, before if keep_originals else None


def not_finite_error(adapter_name: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


def require_requantizable(backend: Any) -> None:
    """Raise ``TypeError`` unless PEFT's quantization backend can read and write weights."""
    if not backend.supports_merge:
        raise TypeError(
            f"{backend.backend_name} layers cannot be requantized. "
            'Set quantized_merge="keep" on the config to keep the delta beside the base.'
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
        "adapter's config to 'keep' (the base does not change, and an exact sidecar adds the delta) or 'requantize' "
        "(accept the loss), or load the base unquantized."
    )
