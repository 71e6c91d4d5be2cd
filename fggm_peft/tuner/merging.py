"""Merging deltas into base layers, and the account of what became of them.

A dense base gets the delta in place: added in float32, rounded once, the touched entries kept aside
so that unmerging restores them bit for bit. A quantized base is replaced by a new layer, and
unmerging puts the old one back. What requantizing would lose is measured before anything changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import LossyMergeError
from ..core.granularity import GRANULARITIES
from ..core.linear import SparseDelta, additive_linear, effective_weight

if TYPE_CHECKING:
    from .layer import FGGMLayer

MIN_SURVIVAL = 0.95
"""Share of a delta that must survive requantization for ``quantized_merge="auto"`` to go on."""

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class ModuleMerge:
    """What merging did, or would do, to the delta of one module.

    Args:
        delta_norm: Frobenius norm of the delta.
        projection: inner product of the weight's actual change with the delta.
        error_norm: Frobenius norm of (actual change - delta).
        outcome: "added", "requantized", "dequantized" or "kept".
        name: module path.
    """

    delta_norm: float
    projection: float
    error_norm: float
    outcome: str
    name: str = ""

    @property
    def survived(self) -> float:
        """Share of the delta that is in the weight now: its change projected on the delta."""
        return self.projection / self.delta_norm**2 if self.delta_norm else 1.0


@dataclass(frozen=True)
class MergeReport:
    """What became of a delta, module by module."""

    modules: list[ModuleMerge]

    @property
    def survived(self) -> float:
        """Share of the whole delta that is in the weights now."""
        total = sum(m.delta_norm**2 for m in self.modules)
        return sum(m.projection for m in self.modules) / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        modules = {m.name: {**asdict(m), "survived": m.survived} for m in self.modules}
        return {"survived": self.survived, "modules": modules}

    def __str__(self) -> str:
        outcomes = sorted({m.outcome for m in self.modules})
        counts = ", ".join(f"{sum(m.outcome == o for m in self.modules)} {o}" for o in outcomes)
        return f"MergeReport({len(self.modules)} modules: {counts or 'nothing merged'}; {self.survived:.2%} survived)"


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
        delta = layer.delta(name)
        old = delta.granularity.gather(matrix, delta.indices)
        new = delta.granularity.added(matrix, delta.indices, delta.values.detach(), delta.scale)
        delta.granularity.put_(matrix, delta.indices, new)
        records.append(_account(new.float() - old.float(), delta.values.detach() * delta.scale, "added"))
        if keep_originals:
            layer.fggm_originals[name] = old
        _merge_bias_(layer, base, name, keep_originals)
    layer.write_back_(weight, matrix)
    return _sum(records)


def check_dense(layer: FGGMLayer, names: Sequence[str]) -> None:
    """Raise ``ValueError`` if merging would make an entry of a dense base NaN or infinite."""
    matrix = layer.matrix(layer.get_base_layer().weight.data)
    for name in names:
        delta = layer.delta(name)
        new = delta.granularity.added(matrix, delta.indices, delta.values.detach(), delta.scale)
        finite = torch.isfinite(new).all()
        if name in layer.fggm_bias:
            finite &= torch.isfinite(layer.fggm_bias[name]).all()
        if not finite:
            raise _not_finite(name)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def _merge_bias_(layer: FGGMLayer, base: nn.Module, name: str, keep_original: bool) -> None:
    if name not in layer.fggm_bias or not layer.fggm_bias[name].numel():
        return
    bias, indices = base.bias.data, layer.fggm_indices[name].long()
    if keep_original:
        layer.fggm_originals[f"{name}_bias"] = bias[indices]
    added = bias[indices].float() + layer.fggm_bias[name].detach().float() * layer.scaling[name]
    bias.index_copy_(0, indices, added.to(bias.dtype))


def _account(change: Tensor, delta: Tensor, outcome: str) -> ModuleMerge:
    change, delta = change.flatten().float(), delta.flatten().float()
    return ModuleMerge(
        delta_norm=float(delta.norm()),
        projection=float(change @ delta) if delta.numel() else 0.0,
        error_norm=float((change - delta).norm()),
        outcome=outcome,
    )


def _sum(records: Sequence[ModuleMerge]) -> ModuleMerge:
    return ModuleMerge(
        delta_norm=sum(r.delta_norm**2 for r in records) ** 0.5,
        projection=sum(r.projection for r in records),
        error_norm=sum(r.error_norm**2 for r in records) ** 0.5,
        outcome=records[0].outcome,
    )


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


def _merged_weight(layer: FGGMLayer, names: Sequence[str], safe: bool) -> tuple[Tensor, Tensor]:
    """The dequantized weight without and with the deltas, ``[o, i]`` each."""
    before = layer.get_base_weight()
    wide = torch.promote_types(before.dtype, torch.float32)
    deltas = [layer.delta(name) for name in names]
    with torch.no_grad():
        after = effective_weight(before.to(wide, copy=True), deltas)
    if safe and not torch.isfinite(after).all():
        raise _not_finite(names[0])
    return before, after


def _requantize(layer, names, safe, dtype):
    if not layer.quantization_backend.supports_merge:
        raise TypeError(
            f"{layer.quantization_backend.backend_name} layers cannot be requantized. "
            'Set quantized_merge="keep" on the config to keep the delta beside the base.'
        )
    before, after = _merged_weight(layer, names, safe)
    trial = copy.deepcopy(layer.get_base_layer())  # backends write to the layer and to its weight's attributes
    holder = SimpleNamespace(base_layer=trial)
    holder.get_base_layer = lambda: holder.base_layer  # HQQ's backend replaces the layer of its holder
    layer.quantization_backend.set_base_weight(holder, after.to(before.dtype))
    trial = holder.base_layer
    now = layer.quantization_backend.get_base_weight(trial)
    trial.train(layer.get_base_layer().training)
    return trial, _account(now.float() - before.float(), after - before, "requantized")


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
    before, after = _merged_weight(layer, names, safe)
    dtype = dtype or getattr(base, "compute_dtype", None) or before.dtype
    with torch.device("meta"):
        dense = nn.Linear(after.shape[1], after.shape[0], bias=base.bias is not None)
    dense.weight = nn.Parameter(after.to(dtype), requires_grad=False)
    if base.bias is not None:
        dense.bias = nn.Parameter(base.bias.detach().to(dtype).clone(), requires_grad=False)
    _copy_hooks(base, dense)
    dense.train(base.training)
    return dense, _account(dense.weight.float() - before.float(), after - before, "dequantized")


def _keep(layer, names, safe, dtype):
    deltas = [layer.delta(name) for name in names]
    if safe and not all(torch.isfinite(delta.values).all() for delta in deltas):
        raise _not_finite(names[0])
    base = _shallow_copy(layer.get_base_layer())
    kept = KeptDelta(getattr(base, KEPT, None), deltas)
    setattr(base, KEPT, kept)
    for key in [key for key, hook in base._forward_hooks.items() if isinstance(hook, KeptDeltaHook)]:
        del base._forward_hooks[key]
    base.register_forward_hook(KeptDeltaHook(), prepend=True)
    square = sum(float((d.values.detach() * d.scale).float().square().sum()) for d in deltas)
    return base, ModuleMerge(square**0.5, square, 0.0, "kept")


_MODES: dict[str, Callable[..., tuple[nn.Module, ModuleMerge]]] = {
    "auto": _auto,
    "requantize": _requantize,
    "dequantize": _dequantize,
    "keep": _keep,
}

KEPT = "fggm_kept"


class KeptDelta(nn.Module):
    """Finished deltas beside a quantized layer: frozen, one support for each granularity.

    It is a submodule of the layer it belongs to, and a forward hook of that layer adds its product;
    so the layer keeps its class, and whatever wraps it next (FGGM, LoRA) adds to the kept output.
    Memory grows with the union of the supports, not with the number of tasks.
    """

    def __init__(self, previous: KeptDelta | None, deltas: Sequence[SparseDelta]):
        super().__init__()
        for delta in previous.deltas if previous is not None else []:
            self._add(delta)
        for delta in deltas:
            values = (delta.values * delta.scale).detach()
            self._add(SparseDelta(delta.granularity, delta.indices.clone(), values))

    @property
    def deltas(self) -> list[SparseDelta]:
        """The kept deltas, at most one of each granularity."""
        names = [name for name in GRANULARITIES if f"indices_{name}" in self._buffers]
        return [
            SparseDelta(GRANULARITIES[n], self._buffers[f"indices_{n}"], self._buffers[f"values_{n}"]) for n in names
        ]

    def _add(self, new: SparseDelta) -> None:
        name = new.granularity.name
        if f"indices_{name}" in self._buffers:
            old = SparseDelta(new.granularity, self._buffers[f"indices_{name}"], self._buffers[f"values_{name}"])
            new = _united(old, new)
        self.register_buffer(f"indices_{name}", new.indices, persistent=False)
        self.register_buffer(f"values_{name}", new.values, persistent=False)

    def extra_repr(self) -> str:
        return ", ".join(f"{len(d.indices)} {d.granularity.name}s" for d in self.deltas)


class KeptDeltaHook:
    """Adds the product of a layer's ``KeptDelta`` to its output."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept = getattr(module, KEPT)
        return additive_linear(output, args[0].to(output.dtype), kept.deltas)


def _united(a: SparseDelta, b: SparseDelta) -> SparseDelta:
    indices = torch.cat([a.indices, b.indices]).unique(sorted=True)
    dim = a.granularity.unit_dim
    shape = list(a.values.shape)
    shape[dim] = len(indices)
    values = a.values.new_zeros(shape)
    for delta in (a, b):
        position = torch.searchsorted(indices, delta.indices)
        values.index_add_(dim, position, delta.values.to(values.dtype))
    return SparseDelta(a.granularity, indices, values)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """The same weights in a module object of its own, so that hooks and submodules may differ."""
    twin = copy.copy(module)
    twin.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return twin


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    for name in _HOOK_DICTS:
        getattr(target, name).update(getattr(source, name))


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
        elif safe or mode == "requantize":
            _MODES[mode](layer, todo, safe, None)
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
