"""The original entries of a base that deltas changed, and the exact removal of a delta from a merged model.

The originals cover the union of the supports. A task is removed by restoring them and adding the other tasks again in
their order. The result equals, bit for bit, the model without the task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..core.errors import AdapterFileError
from ..core.granularity import Granularity, granularity_from
from ..core.weight_delta import in_one_granularity, union
from ..tuner.files.atomic import write_tensors
from ..tuner.layer import FGGMLayer
from ..tuner.merging.sidecar import Sidecar, sidecar_deltas, with_sidecar, without_sidecar
from .apply import replace_module
from .delta import ModuleDelta, SparseDelta

_FORMAT = "fggm_originals 1"
_PARTS = ("indices", "entries")


@dataclass(frozen=True, eq=False)
class ModuleOriginals:
    """The original entries of one module, on the CPU.

    Args:
        granularity, indices: of the union of the supports; no indices if the layer is quantized.
        entries: the weight's entries there, in the base's dtype.
    """

    granularity: Granularity
    indices: Tensor
    entries: Tensor

    @classmethod
    def of(cls, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> ModuleOriginals:
        """Copy the entries of the weight that the deltas change."""
        granularity, indices, entries = deltas[0].granularity, torch.empty(0, dtype=torch.int64), torch.empty(0)
        if layer.quantization_backend is None:
            supports = in_one_granularity([delta.weight_delta() for delta in deltas], layer.weight_shape)
            granularity, indices = supports[0].granularity, union(supports)
            weight = _weight(layer)
            entries = granularity.gather(layer.matrix(weight), indices.to(weight.device)).cpu()
        return cls(granularity, indices, entries)

    def are_in(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta] = ()) -> bool:
        """Whether the layer equals its base with the deltas added."""
        is_quantized = layer.quantization_backend is not None
        return is_quantized or torch.equal(self.weight_with(layer, deltas), layer.matrix(_weight(layer)))

    def weight_with(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> Tensor:
        """The layer's dense weight ``[o, i]`` with the originals restored and the deltas added."""
        weight = _weight(layer)
        matrix = layer.matrix(weight).clone()
        self.granularity.put_(matrix, self.indices.to(weight.device), self.entries.to(weight.device, matrix.dtype))
        for delta in (delta.to(weight.device) for delta in deltas):
            delta.granularity.add_(matrix, delta.indices, delta.values)
        return matrix


class Originals(dict[str, ModuleOriginals]):
    """The original entries of a model by module path."""

    @classmethod
    def of(cls, layers: Mapping[str, FGGMLayer], deltas: Sequence[SparseDelta]) -> Originals:
        """Copy the entries of the layers (by module path) that the deltas change."""
        return cls(
            (path, ModuleOriginals.of(layer, [delta.modules[path] for delta in deltas if path in delta.modules]))
            for path, layer in layers.items()
        )

    def are_in(self, layers: Mapping[str, FGGMLayer]) -> bool:
        """Whether the layers have these entries now."""
        return all(originals.are_in(layers[path]) for path, originals in self.items() if path in layers)

    def __missing__(self, path: str) -> ModuleOriginals:
        raise ValueError(
            f"the ledger has no original entries of {path}, so the task cannot be removed from the model. Apply the "
            "ledger to the base without the task instead: ledger.remove(task); ledger.apply(base)"
        )

    def save(self, file: Path) -> None:
        """Write the originals; the file is never incomplete."""
        tensors = {f"{path}/{part}": getattr(o, part) for path, o in self.items() for part in _PARTS}
        granularities = {path: originals.granularity.to_dict() for path, originals in self.items()}
        write_tensors(file, tensors, {"format": _FORMAT, "granularities": json.dumps(granularities)})

    @classmethod
    def load(cls, file: Path) -> Originals:
        """Read what ``save`` wrote; empty if there is no file.

        Raises:
            AdapterFileError: the file is damaged.
        """
        originals = cls()
        if not file.is_file():
            return originals
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}")
                for path, name in json.loads(metadata["granularities"]).items():
                    tensors = (opened.get_tensor(f"{path}/{part}") for part in _PARTS)
                    originals[path] = ModuleOriginals(granularity_from(name), *tensors)
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise AdapterFileError(f"{file} is damaged: {error}") from error
        return originals


def remove_task_(
    model: nn.Module,
    layers: Mapping[str, FGGMLayer],
    deltas: Mapping[str, SparseDelta],
    task: str,
    originals: Originals,
) -> Literal["originals", "sidecar"]:
    """Remove a task from a model in place.

    Args:
        layers: the model's layers, by module path.
        deltas: the deltas of all merged tasks in order, including the task.
        originals: entries of the base.

    Returns:
        "sidecar" if all of the task's layers are quantized, otherwise "originals".

    Raises:
        ValueError: the model is not the base with these deltas, or originals are missing. Nothing has changed then.
    """
    paths = list(deltas[task].modules)
    quantized = {path for path in paths if layers[path].quantization_backend is not None}
    for path in paths:
        merged = [delta.modules[path] for delta in deltas.values() if path in delta.modules]
        if path in quantized:
            _require_sidecar(layers[path], merged, path)
        elif not originals[path].are_in(layers[path], merged):
            raise ValueError(
                f"{path}: the weight is not that of the base with the ledger's tasks merged in order; pass "
                "up_to=<last merged task>, or apply the ledger to the base again"
            )
    for path in paths:
        layer = layers[path]
        others = [delta.modules[path] for name, delta in deltas.items() if name != task and path in delta.modules]
        if path not in quantized:
            matrix = originals[path].weight_with(layer, others)
            layer.write_back_(_weight(layer), matrix)
            continue
        bare, keep = without_sidecar(layer.get_base_layer()), [other.weight_delta() for other in others]
        replace_module(model, path, with_sidecar(bare, keep) if keep else bare)
    return "sidecar" if len(quantized) == len(paths) else "originals"


def _weight(layer: FGGMLayer) -> Tensor:
    base: Any = layer.get_base_layer()
    return base.weight.data


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
