"""Merging deltas into base layers, and the account of what became of them.

A dense base gets the delta in place: added in float32, rounded once, the touched entries kept aside
so that unmerging restores them bit for bit. A quantized base is replaced by a new layer, and
unmerging puts the old one back. What requantizing would lose is measured before anything changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.errors import LossyMergeError
from ...core.granularity import sum_rounded_once
from ...core.linear import effective_weight
from ...core.ranking import all_finite
from ...core.weight_delta import WeightDelta
from .report import MergeReport, ModuleMerge, account, from_products, products, total
from .sidecar import KeptDeltaHook, keep_beside

if TYPE_CHECKING:
    from ..layer import FGGMLayer

MIN_SURVIVAL = 0.95
"""Share of a delta that must survive requantization for ``quantized_merge="auto"`` to go on."""

PIECE = 2**16
"""How many entries are added at a time on a CPU."""

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def merge_dense_(layer: FGGMLayer, names: Sequence[str], safe: bool, keep_originals: bool) -> ModuleMerge:
    """Add the deltas to a dense base layer in place.

    Raises:
        ValueError: a merged entry is not finite, with ``safe``; nothing has been changed then.
    """
    base = layer.get_base_layer()
    weight = base.weight.data
    if safe:
        check_dense(layer, names)
    matrix = layer.matrix(weight)
    records = []
    for name in names:
        record, old = add_to_dense_(matrix, layer.delta(name), keep_originals)
        records.append(record)
        if old is not None:
            layer.fggm_originals[name] = old
        _merge_bias_(layer, base, name, keep_originals)
    layer.write_back_(weight, matrix)
    return total(records)


def add_to_dense_(matrix: Tensor, delta: WeightDelta, keep_originals: bool) -> tuple[ModuleMerge, Tensor | None]:
    """Add a delta to a weight ``[o, i]`` in place; returns what became of it, and the entries as they were."""
    kind, values = delta.granularity, delta.values.detach()
    old = values.new_empty(values.shape, dtype=matrix.dtype) if keep_originals else None
    # what is made on the way stays in the processor's cache, and is not written to fresh memory
    size = PIECE if matrix.device.type == "cpu" else values.numel()
    tensors = [values] if old is None else [values, old]
    wide = torch.promote_types(matrix.dtype, torch.float32)
    sums: list[Tensor] = []
    for part, indices, change, *kept in kind.pieces(matrix, delta.indices, tensors, size) if values.numel() else ():
        before = kind.gather(part, indices)
        after = sum_rounded_once(before, change, delta.scale)
        kind.put_(part, indices, after)
        meant = change.to(wide) if delta.scale == 1 else change.to(wide) * delta.scale
        sums += products(after.to(wide) - before.to(wide), meant)
        for entries in kept:
            entries.copy_(before)
    return from_products(sums, "added"), old


def check_dense(layer: FGGMLayer, names: Sequence[str]) -> None:
    """Raise ``ValueError`` if merging would make an entry of a dense base NaN or infinite."""
    matrix = layer.matrix(layer.get_base_weight())
    for name in names:
        delta = layer.delta(name)
        new = delta.granularity.added(matrix, delta.indices, delta.values.detach(), delta.scale)
        finite = all_finite(new)
        if name in layer.fggm_bias:
            finite = finite and all_finite(layer.fggm_bias[name])
        if not finite:
            raise _not_finite(name)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def _merge_bias_(layer: FGGMLayer, base: nn.Module, name: str, keep_original: bool) -> None:
    if name not in layer.fggm_bias or not layer.fggm_bias[name].numel():
        return
    bias, indices = base.bias.data, layer.fggm_indices[name].long()
    if keep_original:
        layer.fggm_original_bias[name] = bias[indices]
    added = sum_rounded_once(bias[indices], layer.fggm_bias[name].detach(), layer.scaling[name])
    bias.index_copy_(0, indices, added)


# Quantized bases --------------------------------------------------------------------------------


def merge_quantized(
    layer: FGGMLayer, names: Sequence[str], safe: bool, mode: str | None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, ModuleMerge]:
    """A new base layer that holds the deltas; the layer and its base stay as they are.

    Args:
        mode: how; by default the adapter's ``quantized_merge``.
        dtype: of the dense layer that "dequantize" makes; by default the compute dtype.

    Raises:
        ValueError: the merged weights are not finite, with ``safe``.
        LossyMergeError: mode "auto", and too little of this layer's delta would survive.
        TypeError: the backend cannot give or take weights, and the mode is not "keep".
    """
    mode = mode or layer.quantized_merge[names[0]]
    replacement, report = _MODES[mode](layer, names, safe, dtype)
    with torch.no_grad():
        for name in names:
            if name in layer.fggm_bias and layer.fggm_bias[name].numel():
                replacement.bias = nn.Parameter(replacement.bias.detach().clone(), requires_grad=False)
                _merge_bias_(layer, replacement, name, keep_original=False)
    return replacement, report


def _merged_weight(layer: FGGMLayer, names: Sequence[str], safe: bool, before: Tensor) -> Tensor:
    """The dequantized weight ``before`` with the deltas added, ``[o, i]`` in float32 at least."""
    wide = torch.promote_types(before.dtype, torch.float32)
    deltas = [layer.delta(name) for name in names]
    with torch.no_grad():
        after = effective_weight(before.to(wide, copy=True), deltas)
    if safe and not all_finite(after):
        raise _not_finite(names[0])
    return after


def _require_requantizable(layer: FGGMLayer) -> None:
    if not layer.quantization_backend.supports_merge:
        raise TypeError(
            f"{layer.quantization_backend.backend_name} layers cannot be requantized. "
            'Set quantized_merge="keep" on the config to keep the delta beside the base.'
        )


def _requantize(layer, names, safe, dtype):
    _require_requantizable(layer)
    before = layer.get_base_weight()
    after = _merged_weight(layer, names, safe, before)
    trial = copy.deepcopy(layer.get_base_layer())  # backends write to the layer and to its weight's attributes
    holder = SimpleNamespace(base_layer=trial)
    holder.get_base_layer = lambda: holder.base_layer  # HQQ's backend replaces the layer of its holder
    layer.quantization_backend.set_base_weight(holder, after.to(before.dtype))
    trial = holder.base_layer
    now = layer.quantization_backend.get_base_weight(trial)
    trial.train(layer.get_base_layer().training)
    return trial, account(now.float() - before.float(), after - before, "requantized")


def _auto(layer, names, safe, dtype):
    replacement, report = _requantize(layer, names, safe, dtype)
    if report.survived < MIN_SURVIVAL:
        raise lossy_merge_error(MergeReport([report]))
    return replacement, report


def lossy_merge_error(report: MergeReport) -> LossyMergeError:
    """The error of mode "auto": the figure and the ways out."""
    return LossyMergeError(
        f"requantizing the merged weights would keep {report.survived:.1%} of the delta, less than the "
        f"{MIN_SURVIVAL:.0%} that quantized_merge='auto' asks for. Nothing was changed. Set quantized_merge on the "
        "adapter's config to 'keep' (base untouched, the delta stays beside it, exact), 'dequantize' (these layers "
        "become dense) or 'requantize' (accept the loss), or load the base unquantized."
    )


def _dequantize(layer, names, safe, dtype):
    base = layer.get_base_layer()
    before = layer.weight_copy()  # with what has been kept beside the quantized layer, which is folded in here
    after = _merged_weight(layer, names, safe, before)
    dtype = dtype or getattr(base, "compute_dtype", None) or before.dtype
    with torch.device("meta"):
        dense = nn.Linear(after.shape[1], after.shape[0], bias=base.bias is not None)
    dense.weight = nn.Parameter(after.to(dtype), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(dtype).clone(), requires_grad=False)
    for name in _HOOK_DICTS:
        hooks = getattr(base, name).items()
        getattr(dense, name).update({key: hook for key, hook in hooks if not isinstance(hook, KeptDeltaHook)})
    dense.train(base.training)
    return dense, account(dense.weight.float() - before.float(), after - before, "dequantized")


def _keep(layer, names, safe, dtype):
    deltas = [layer.delta(name) for name in names]
    if safe and not all(all_finite(delta.values) for delta in deltas):
        raise _not_finite(names[0])
    base = keep_beside(layer.get_base_layer(), deltas)
    square = sum(float((d.values.detach() * d.scale).float().square().sum()) for d in deltas)
    return base, ModuleMerge(square**0.5, square, 0.0, "kept")


_MODES: dict[str, Callable[..., tuple[nn.Module, ModuleMerge]]] = {
    "auto": _auto,
    "requantize": _requantize,
    "dequantize": _dequantize,
    "keep": _keep,
}


# Whole models -----------------------------------------------------------------------------------


def preview_merge(layers: dict[str, FGGMLayer], names: Sequence[str] | None, safe: bool) -> MergeReport:
    """Check a merge over all layers before the first of them is changed.

    Args:
        layers: module path -> layer.
        names: the adapters to merge; each layer's active ones by default.
        safe: check that merged weights are finite too.

    Returns:
        What would become of the deltas of the layers that mode "auto" would requantize.

    Raises:
        ValueError: merged weights would not be finite, with ``safe``.
        LossyMergeError: mode "auto", and too little of the delta would survive over the model.
    """
    modules = []
    for path, layer in layers.items():
        todo = pending(layer, names)
        if not todo:
            continue
        if layer.quantization_backend is None:
            if safe:
                check_dense(layer, todo)
            continue
        mode = layer.quantized_merge[todo[0]]
        if mode == "auto":
            _, record = _requantize(layer, todo, safe, None)
            modules.append(replace(record, name=path))
        elif safe:
            _MODES[mode](layer, todo, safe, None)
        elif mode == "requantize":
            _require_requantizable(layer)  # the quantizing itself is left to the merge
    report = MergeReport(modules)
    if report.survived < MIN_SURVIVAL:
        raise lossy_merge_error(report)
    return report


def pending(layer: FGGMLayer, names: Sequence[str] | None) -> list[str]:
    """Which of the named adapters (the active ones by default) the layer has and has not merged yet."""
    wanted = names if names is not None else layer.active_adapters
    return [name for name in wanted if name in layer.fggm_values and name not in layer.merged_adapters]


def commit_mode(layer: FGGMLayer, names: Sequence[str]) -> str:
    """The mode that carries out a merge which ``preview_merge`` has let pass."""
    mode = layer.quantized_merge[names[0]]
    return "requantize" if mode == "auto" else mode
