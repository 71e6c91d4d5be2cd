"""What a base had where deltas have changed it, and how a delta is taken out of what was merged.

The entries on the union of the supports are kept. A task is taken out by putting them back and adding the other tasks
again, in their order: that gives, bit for bit, what the model would be without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.errors import AdapterFileError
from ..core.granularity import Granularity, granularity_from
from ..core.weight_delta import WeightDelta, in_one_granularity, union
from ..tuner.layer import FGGMLayer
from ..tuner.merging.sidecar import KEPT, KeptDelta, keep_beside, without_kept
from .apply import add_bias_, change_weight_, set_module
from .delta import ModuleDelta, SparseDelta, moved_to
from .meta_base import Base
from .weights import weights_of

_FORMAT = "fggm_originals 1"


@dataclass(frozen=True, eq=False)
class Kept:
    """The entries of one module as they were.

    Args:
        granularity, indices: of the union of the supports.
        entries: of the weight there, in the base's dtype.
        rows, bias: the rows whose bias is changed, and its entries there; of no length if none is.
    """

    granularity: Granularity
    indices: Tensor
    entries: Tensor
    rows: Tensor
    bias: Tensor


class Originals:
    """Those of a model: module path -> what was there. Quantized layers have none, as they do not change."""

    def __init__(self, modules: Mapping[str, Kept]):
        self.modules = dict(modules)

    @classmethod
    def of(cls, layers: Mapping[str, FGGMLayer], deltas: Sequence[SparseDelta]) -> Originals:
        """Of the layers as they are now, on the union of the supports."""
        dense = {name: layer for name, layer in layers.items() if layer.quantization_backend is None}
        return cls({name: _gathered(layer, *_weight_and_bias(layer), name, deltas) for name, layer in dense.items()})

    @classmethod
    def from_base(cls, layers: Mapping[str, FGGMLayer], deltas: Sequence[SparseDelta], base: Base) -> Originals:
        """Of a base model, or of a checkpoint of it, of which only these layers are read.

        Raises:
            ValueError: it has no such weight.
        """
        weights, modules = weights_of(base), {}
        for name, layer in layers.items():
            if layer.quantization_backend is not None:
                continue
            like = layer.get_base_layer().weight
            weight = weights.find([f"{name}.weight"])
            if weight is None or weight.shape != like.shape:
                raise ValueError(f"{weights.where} has no weight {list(like.shape)} of {name}: it is another base")
            bias = weights.find([f"{name}.bias"])
            weight, bias = (None if t is None else t.to(like.device, like.dtype) for t in (weight, bias))
            modules[name] = _gathered(layer, weight, bias, name, deltas)
        return cls(modules)

    def are_in(self, layers: Mapping[str, FGGMLayer]) -> bool:
        """Whether the layers have these entries now."""
        for name in self.modules.keys() & layers.keys():
            kept, layer = self.modules[name], layers[name]
            weight, bias = _weight_and_bias(layer)
            now = kept.granularity.gather(layer.matrix(weight), kept.indices.to(weight.device)).cpu()
            if not torch.equal(now, kept.entries.to(now.dtype)):
                return False
            if len(kept.rows) and (bias is None or not torch.equal(bias[kept.rows].cpu(), kept.bias.to(bias.dtype))):
                return False
        return True

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        tensors = {}
        for name, kept in self.modules.items():
            for part in ("indices", "entries", "rows", "bias"):
                tensors[f"{name}/{part}"] = getattr(kept, part).cpu().contiguous()
        kinds = {name: kept.granularity.to_dict() for name, kept in self.modules.items()}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, {"format": _FORMAT, "granularities": json.dumps(kinds)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Originals:
        """Read what ``save`` wrote.

        Raises:
            AdapterFileError: the file is damaged.
        """
        try:
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise AdapterFileError(f"{path} holds no originals (format {metadata.get('format')!r})")
                kinds = json.loads(metadata["granularities"])

                def kept(name: str, kind: str) -> Kept:
                    parts = (opened.get_tensor(f"{name}/{part}") for part in ("indices", "entries", "rows", "bias"))
                    return Kept(granularity_from(kind), *parts)

                return cls({name: kept(name, kind) for name, kind in kinds.items()})
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise AdapterFileError(f"{path} is damaged: {error}") from error


def put_back(
    model: nn.Module,
    layers: Mapping[str, FGGMLayer],
    deltas: Mapping[str, SparseDelta],
    task: str,
    originals: Originals | None,
) -> str:
    """Take a task out of a model in place.

    Args:
        layers: of the model, by module path.
        deltas: of all tasks that are in it, in order; the task's own among them.
        originals: of the base; None to subtract.

    Returns:
        "originals"; "sidecar" if all of the task's layers are quantized; "subtraction" if something was subtracted.

    Raises:
        ValueError: the model is not what these deltas give on these originals. Nothing has been changed then.
    """
    quantized = {name for name, layer in layers.items() if layer.quantization_backend is not None}
    names = list(deltas[task].modules)
    for name in names:
        held = [delta.modules[name] for delta in deltas.values() if name in delta.modules]
        if name in quantized:
            _require_sidecar(layers[name], held, name)
        elif originals is not None:
            _require_merged(layers[name], _of(originals, name), held, name)
    for name in names:
        others = [delta.modules[name] for other, delta in deltas.items() if other != task and name in delta.modules]
        if name in quantized:
            bare = without_kept(layers[name].get_base_layer())
            set_module(model, name, keep_beside(bare, [other.scaled() for other in others]) if others else bare)
            _take_bias_(layers[name], deltas[task].modules[name])
        elif originals is None:
            _subtract_(layers[name], deltas[task].modules[name])
        else:
            _restore_(layers[name], _of(originals, name), others)
    if any(name in quantized and deltas[task].modules[name].bias is not None for name in names):
        return "subtraction"  # biases are not quantized, and have no sidecar
    if all(name in quantized for name in names):
        return "sidecar"
    return "subtraction" if originals is None else "originals"


def _of(originals: Originals, name: str) -> Kept:
    if name not in originals.modules:
        raise ValueError(f"no originals of {name} were kept: apply the ledger again to its base, or pass base=")
    return originals.modules[name]


def _weight_and_bias(layer: FGGMLayer) -> tuple[Tensor, Tensor | None]:
    base: Any = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    return base.weight.data, None if bias is None else bias.data


def _gathered(layer: FGGMLayer, weight: Tensor, bias: Tensor | None, name: str, deltas: Sequence[SparseDelta]) -> Kept:
    held = [delta.modules[name] for delta in deltas if name in delta.modules]
    supports = in_one_granularity([module.scaled() for module in held], layer.weight_shape)
    kind, indices = supports[0].granularity, union(supports)
    entries = kind.gather(layer.matrix(weight), indices.to(weight.device)).cpu()
    rows = [module.indices.long() for module in held if module.bias is not None]
    if not rows or bias is None:
        return Kept(kind, indices, entries, torch.empty(0, dtype=torch.int64), torch.empty(0))
    changed = torch.cat(rows).unique(sorted=True)
    return Kept(kind, indices, entries, changed, bias[changed.to(bias.device)].cpu())


def _replayed(layer: FGGMLayer, kept: Kept, deltas: Sequence[ModuleDelta]) -> tuple[Tensor, Tensor | None]:
    """The weight ``[o, i]`` and the bias of a layer with the originals put back and these deltas added."""
    weight, bias = _weight_and_bias(layer)
    device = weight.device
    matrix = layer.matrix(weight).clone()
    kept.granularity.put_(matrix, kept.indices.to(device), kept.entries.to(device, matrix.dtype))
    bias = None if bias is None else bias.clone()
    if bias is not None and len(kept.rows):
        bias.index_copy_(0, kept.rows.to(device), kept.bias.to(device, bias.dtype))
    for delta in (moved_to(delta, device) for delta in deltas):
        delta.granularity.add_(matrix, delta.indices, delta.values)
        if delta.bias is not None and bias is not None:
            add_bias_(bias, delta)
    return matrix, bias


def _require_merged(layer: FGGMLayer, kept: Kept, deltas: Sequence[ModuleDelta], name: str) -> None:
    matrix, bias = _replayed(layer, kept, deltas)
    weight, now = _weight_and_bias(layer)
    if torch.equal(matrix, layer.matrix(weight)) and (bias is None or now is None or torch.equal(bias, now)):
        return
    raise ValueError(
        f"the model is not its base with the ledger's tasks merged in their order ({name} differs). Say by up_to= "
        "which is the last task in it, or apply the ledger to the base again"
    )


def _restore_(layer: FGGMLayer, kept: Kept, deltas: Sequence[ModuleDelta]) -> None:
    matrix, bias = _replayed(layer, kept, deltas)
    change_weight_(layer, lambda weight: weight.copy_(matrix))
    if bias is not None:
        layer.get_base_layer().bias.data.copy_(bias)


def _subtract_(layer: FGGMLayer, delta: ModuleDelta) -> None:
    here = moved_to(delta, layer.device)
    change_weight_(layer, lambda weight: delta.granularity.add_(weight, here.indices, here.values, -1.0))
    _take_bias_(layer, delta)


def _take_bias_(layer: FGGMLayer, delta: ModuleDelta) -> None:
    if delta.bias is not None:
        bias = layer.get_base_layer().bias.data
        add_bias_(bias, moved_to(delta, bias.device), sign=-1.0)


def _require_sidecar(layer: FGGMLayer, deltas: Sequence[ModuleDelta], name: str) -> None:
    there: Any = getattr(layer.get_base_layer(), KEPT, None)
    expected = KeptDelta(None, [delta.scaled() for delta in deltas])
    found: dict[Any, WeightDelta] = {} if there is None else {d.granularity: d for d in there.deltas}
    for delta in expected.deltas:
        other = found.pop(delta.granularity, None)
        same = other is not None and torch.equal(other.indices.cpu(), delta.indices)
        if not same or not torch.equal(other.values.cpu(), delta.values):
            found[name] = delta
    if found:
        raise ValueError(
            f"what is kept beside {name} is not the sum of the ledger's tasks in their order. Say by up_to= which is "
            "the last task in it"
        )
