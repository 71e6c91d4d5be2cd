"""The original entries of a base that deltas changed, and the exact removal of a delta from a merged model.

The originals cover the union of the supports. A task is removed by restoring them and adding the other tasks again in
their order. The result equals, bit for bit, the model without the task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.errors import AdapterFileError
from ..core.granularity import Granularity, granularity_from
from ..core.weight_delta import in_one_granularity, union
from ..tuner.files.atomic import write_tensors
from ..tuner.layer import FGGMLayer
from ..tuner.merging.sidecar import Sidecar, sidecar_deltas, with_sidecar, without_sidecar
from .apply import add_bias_, change_weight_, replace_module
from .base_model import Base, weights_of
from .delta import ModuleDelta, SparseDelta

_FORMAT = "fggm_originals 1"
_PARTS = ("indices", "entries", "rows", "bias")


@dataclass(frozen=True, eq=False)
class ModuleOriginals:
    """The original entries of one module, on the CPU.

    Args:
        granularity, indices: of the union of the supports.
        entries: the weight's entries there, in the base's dtype.
        rows, bias: the rows whose bias changes, and their original bias entries; empty if no bias changes.
    """

    granularity: Granularity
    indices: Tensor
    entries: Tensor
    rows: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, layer: FGGMLayer, weight: Tensor, bias: Tensor | None, deltas: Sequence[ModuleDelta]
    ) -> ModuleOriginals:
        """Copy the entries of a weight, and of its bias, that the deltas change."""
        supports = in_one_granularity([delta.weight_delta() for delta in deltas], layer.weight_shape)
        granularity, indices = supports[0].granularity, union(supports)
        entries = granularity.gather(layer.matrix(weight), indices.to(weight.device)).cpu()
        rows = [delta.indices.long() for delta in deltas if delta.bias is not None]
        if not rows or bias is None:
            return cls(granularity, indices, entries, torch.empty(0, dtype=torch.int64), torch.empty(0))
        changed = torch.cat(rows).unique(sorted=True)
        return cls(granularity, indices, entries, changed, bias[changed.to(bias.device)].cpu())

    def are_in(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta] = ()) -> bool:
        """Whether the layer equals its base with the deltas added."""
        weight, bias = _weight_and_bias(layer)
        expected, expected_bias = self.with_deltas(layer, deltas)
        if not torch.equal(expected, layer.matrix(weight)):
            return False
        return bias is None or expected_bias is None or torch.equal(bias, expected_bias)

    def with_deltas(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> tuple[Tensor, Tensor | None]:
        """The layer's weight ``[o, i]`` and bias with the originals restored and the deltas added."""
        weight, bias = _weight_and_bias(layer)
        device, matrix = weight.device, layer.matrix(weight).clone()
        self.granularity.put_(matrix, self.indices.to(device), self.entries.to(device, matrix.dtype))
        bias = None if bias is None else bias.clone()
        if bias is not None and len(self.rows):
            bias.index_copy_(0, self.rows.to(device), self.bias.to(device, bias.dtype))
        for delta in (delta.to(device) for delta in deltas):
            delta.granularity.add_(matrix, delta.indices, delta.values)
            add_bias_(bias, delta)
        return matrix, bias


class Originals(dict[str, ModuleOriginals]):
    """The original entries of a model by module path. Quantized layers do not change and have none."""

    @classmethod
    def of(cls, layers: Mapping[str, FGGMLayer], deltas: Sequence[SparseDelta], base: Base | None = None) -> Originals:
        """Copy the entries that the deltas change.

        Args:
            layers: module path -> layer of the model.
            base: copy from this model or checkpoint instead; only the layers' weights are read.

        Raises:
            ValueError: the base has no such weight.
        """
        weights, originals = None if base is None else weights_of(base), cls()
        for path, layer in layers.items():
            if layer.quantization_backend is not None:
                continue
            weight, bias = _weight_and_bias(layer)
            if weights is not None:
                original = weights.find([f"{path}.weight"])
                if original is None or original.shape != weight.shape:
                    raise ValueError(f"{weights.where} is another base: it has no {path} of {list(weight.shape)}")
                original_bias = weights.find([f"{path}.bias"])
                bias = None if original_bias is None else original_bias.to(weight.device, weight.dtype)
                weight = original.to(weight.device, weight.dtype)
            changes = [delta.modules[path] for delta in deltas if path in delta.modules]
            originals[path] = ModuleOriginals.of(layer, weight, bias, changes)
        return originals

    def are_in(self, layers: Mapping[str, FGGMLayer]) -> bool:
        """Whether the layers have these entries now."""
        return all(originals.are_in(layers[path]) for path, originals in self.items() if path in layers)

    def __missing__(self, path: str) -> ModuleOriginals:
        raise ValueError(f"no originals of {path} were kept: apply the ledger again to its base, or pass base=")

    def save(self, file: Path) -> None:
        """Write the originals; the file is never incomplete."""
        tensors = {f"{path}/{part}": getattr(o, part) for path, o in self.items() for part in _PARTS}
        granularities = {path: originals.granularity.to_dict() for path, originals in self.items()}
        write_tensors(file, tensors, {"format": _FORMAT, "granularities": json.dumps(granularities)})

    @classmethod
    def load(cls, file: Path) -> Originals:
        """Read what ``save`` wrote.

        Raises:
            AdapterFileError: the file is damaged.
        """
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                originals = cls()
                for path, name in json.loads(metadata["granularities"]).items():
                    tensors = (opened.get_tensor(f"{path}/{part}") for part in _PARTS)
                    originals[path] = ModuleOriginals(granularity_from(name), *tensors)
                return originals
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise AdapterFileError(f"{file} is damaged: {error}") from error


def remove_task_(
    model: nn.Module,
    layers: Mapping[str, FGGMLayer],
    deltas: Mapping[str, SparseDelta],
    task: str,
    originals: Originals | None,
) -> str:
    """Remove a task from a model in place.

    Args:
        layers: the model's layers, by module path.
        deltas: the deltas of all merged tasks in order, including the task.
        originals: entries of the base; None to subtract the delta.

    Returns:
        "originals"; "sidecar" if all of the task's layers are quantized; "subtraction" if something was subtracted.

    Raises:
        ValueError: the model is not the base with these deltas. Nothing has changed then.
    """
    modules = deltas[task].modules
    quantized = {path for path in modules if layers[path].quantization_backend is not None}
    for path in modules:
        merged = [delta.modules[path] for delta in deltas.values() if path in delta.modules]
        if path in quantized:
            _require_sidecar(layers[path], merged, path)
        elif originals is not None and not originals[path].are_in(layers[path], merged):
            raise ValueError(
                f"{path}: the weight is not that of the base with the ledger's tasks merged in order; pass "
                "up_to=<last merged task>, or apply the ledger to the base again"
            )
    for path, module in modules.items():
        layer = layers[path]
        others = [delta.modules[path] for name, delta in deltas.items() if name != task and path in delta.modules]
        if path in quantized:
            bare = without_sidecar(layer.get_base_layer())
            keep = [other.weight_delta() for other in others]
            replace_module(model, path, with_sidecar(bare, keep) if keep else bare)
            add_bias_(_weight_and_bias(layer)[1], module, scale=-1.0)
        elif originals is None:
            _subtract_(layer, module)
        else:
            _restore_(layer, originals[path], others)
    # the bias of a quantized layer is dense, and there are no originals of it
    if any(modules[path].bias is not None for path in quantized):
        return "subtraction"
    if len(quantized) == len(modules):
        return "sidecar"
    return "subtraction" if originals is None else "originals"


def _weight_and_bias(layer: FGGMLayer) -> tuple[Tensor, Tensor | None]:
    base: Any = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    return base.weight.data, None if bias is None else bias.data


def _restore_(layer: FGGMLayer, originals: ModuleOriginals, deltas: Sequence[ModuleDelta]) -> None:
    matrix, bias = originals.with_deltas(layer, deltas)
    change_weight_(layer, lambda weight: weight.copy_(matrix))
    current = _weight_and_bias(layer)[1]
    if bias is not None and current is not None:
        current.copy_(bias)


def _subtract_(layer: FGGMLayer, delta: ModuleDelta) -> None:
    delta = delta.to(layer.device)
    change_weight_(layer, lambda weight: delta.granularity.add_(weight, delta.indices, delta.values, -1.0))
    add_bias_(_weight_and_bias(layer)[1], delta, scale=-1.0)


def _require_sidecar(layer: FGGMLayer, deltas: Sequence[ModuleDelta], path: str) -> None:
    """Raise unless the sidecar is the sum of the deltas."""
    current = {delta.granularity: delta for delta in sidecar_deltas(layer.get_base_layer())}
    expected = {d.granularity: d for d in Sidecar([delta.weight_delta() for delta in deltas]).deltas}
    is_equal = current.keys() == expected.keys()
    for kind, delta in expected.items() if is_equal else ():
        is_equal &= torch.equal(current[kind].indices.cpu(), delta.indices)
        is_equal &= torch.equal(current[kind].values.cpu(), delta.values)
    if not is_equal:
        raise ValueError(f"{path}: its sidecar is not the sum of the ledger's tasks; pass up_to=<last merged task>")
