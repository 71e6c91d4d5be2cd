"""The original entries of a base that deltas changed, and the exact removal of a delta from a merged model.

The originals cover the union of the supports. A task is removed by restoring them and adding the other tasks again in
their order. The result equals, bit for bit, the model without the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import AdapterFileError
from ..core.granularity import Granularity, granularity_from
from ..core.weight_delta import in_one_granularity, union
from ..tuner.files.atomic import read_tensors, write_tensors
from ..tuner.layer import FGGMLayer
from ..tuner.merging.sidecar import Sidecar, sidecar_deltas, with_sidecar, without_sidecar
from .delta import ModuleDelta, SparseDelta

_FORMAT = "fggm_originals 1"


@dataclass(frozen=True, eq=False)
class Originals:
    """The entries of one weight on the union of the supports, on the CPU and in the base's dtype."""

    granularity: Granularity
    indices: Tensor
    entries: Tensor

    @classmethod
    def of(cls, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> Originals:
        """Copy the entries of the layer's weight that the deltas change."""
        supports = in_one_granularity(deltas, layer.weight_shape)
        granularity, indices, matrix = supports[0].granularity, union(supports), _matrix(layer)
        return cls(granularity, indices, granularity.gather(matrix, indices.to(matrix.device)).cpu())

    def with_deltas(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> Tensor:
        """The layer's dense weight ``[o, i]`` with the originals restored and the deltas added."""
        matrix = _matrix(layer).clone()
        self.granularity.put_(matrix, self.indices.to(matrix.device), self.entries.to(matrix.device, matrix.dtype))
        for delta in (delta.to(matrix.device) for delta in deltas):
            delta.granularity.add_(matrix, delta.indices, delta.values)
        return matrix

    def are_in(self, layer: FGGMLayer, deltas: Sequence[ModuleDelta] = ()) -> bool:
        """Whether the layer's weight equals that of the base with the deltas added."""
        return torch.equal(self.with_deltas(layer, deltas), _matrix(layer))


def _matrix(layer: FGGMLayer) -> Tensor:
    return layer.matrix(layer.get_base_layer().weight.detach())


def write_originals(file: Path, originals: Mapping[str, Originals]) -> None:
    """Write the originals by module path; the file is never incomplete."""
    tensors = {f"{path}/{part}": getattr(o, part) for path, o in originals.items() for part in ("indices", "entries")}
    write_tensors(file, tensors, _FORMAT, {path: o.granularity.to_dict() for path, o in originals.items()})


def read_originals(file: Path) -> dict[str, Originals]:
    """Read what ``write_originals`` wrote; empty if there is no file."""
    if not file.is_file():
        return {}
    with read_tensors(file, _FORMAT, AdapterFileError) as (granularities, tensors):
        return {
            path: Originals(granularity_from(name), tensors[f"{path}/indices"], tensors[f"{path}/entries"])
            for path, name in granularities.items()
        }


def remove_task_(
    model: nn.Module,
    layers: Mapping[str, FGGMLayer],
    deltas: Mapping[str, SparseDelta],
    task: str,
    originals: Mapping[str, Originals],
) -> None:
    """Remove a task from a model in place. Quantized layers need no originals, because their tasks are in a sidecar.

    Args:
        layers: the model's layers, by module path.
        deltas: the deltas of all merged tasks in order, including the task.

    Raises:
        ValueError: the model is not the base with these deltas, or originals are missing. Nothing has changed then.
    """
    for path in deltas[task].modules:
        merged = [delta.modules[path] for delta in deltas.values() if path in delta.modules]
        if layers[path].quantization_backend is not None:
            is_merged = _is_sidecar(layers[path], merged)
        elif path not in originals:
            raise ValueError(
                f"the ledger has no original entries of {path}, so the task cannot be removed from the model. Apply "
                "the ledger to the base without the task instead: ledger.remove(task); ledger.apply(base)"
            )
        else:
            is_merged = originals[path].are_in(layers[path], merged)
        if not is_merged:
            raise ValueError(
                f"{path} is not that of the base with the ledger's tasks merged in order. Apply the ledger to the base "
                "again"
            )
    for path in deltas[task].modules:
        layer = layers[path]
        others = [delta.modules[path] for name, delta in deltas.items() if name != task and path in delta.modules]
        if layer.quantization_backend is None:
            layer.write_back_(layer.get_base_layer().weight.detach(), originals[path].with_deltas(layer, others))
        else:
            bare = without_sidecar(layer.get_base_layer())
            model.set_submodule(path, with_sidecar(bare, others) if others else bare)


def _is_sidecar(layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> bool:
    """Whether the layer's sidecar is the sum of the deltas."""
    current = {delta.granularity: delta for delta in sidecar_deltas(layer.get_base_layer())}
    expected = {delta.granularity: delta for delta in Sidecar(deltas).deltas}
    return current.keys() == expected.keys() and all(
        torch.equal(current[kind].indices.cpu(), delta.indices)
        and torch.equal(current[kind].values.cpu(), delta.values)
        for kind, delta in expected.items()
    )
