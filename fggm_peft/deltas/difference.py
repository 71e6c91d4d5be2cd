"""The sparse delta between two whole models: what fine-tuning has changed, exactly, with no more than it has changed.

Two passes over the weights, one tensor of each model at a time: the first counts what has changed, the second takes
it. So neither model is ever in memory as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.fingerprint import samples_per_weight, sketch_weight
from ..core.granularity import Columns, Elements, Granularity, Rows, granularity_from
from ..core.index_codec import index_dtype
from ..tuner.config import FGGMConfig
from ..tuner.files.tensors import PREFIX
from ..tuner.layer import FGGMLayer
from .delta import ModuleDelta, SparseDelta, made_delta
from .meta_base import Base, layer_of, skeleton
from .weights import Weights, weights_of

CANDIDATES = (Rows(), Columns(), Elements())
"""The granularities that ``diff`` chooses from."""
VALUE_BYTES = 4

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def diff(base: Base, tuned: Base, granularity: str | Granularity | None = None, progress: bool = False) -> SparseDelta:
    """What must be added to ``base`` to get ``tuned``.

    Added to the base in float32 and rounded once, as merging does, the values give the tuned weight bit for bit
    wherever one float32 value can; how many entries it cannot is in ``config.selection["inexact_entries"]``. What is
    no matrix (norms) and has changed goes along whole, as ``modules_to_save``.

    Args:
        base, tuned: models, or folders or Hub ids of checkpoints in safetensors files.
        granularity: of the delta; by default the one that takes the fewest bytes.
        progress: show bars.

    Raises:
        ValueError: the models are not of one architecture, nothing has changed, a changed entry is not finite, or
            biases have changed, which the granularity cannot hold.
    """
    kind = None if granularity is None else granularity_from(granularity)
    with torch.no_grad():
        return _Difference(base, tuned, progress).delta(kind)


@dataclass(frozen=True)
class _Parameter:
    """One tensor of the model.

    Args:
        names: of the parameter; several where it is tied, the first is where it counts.
    """

    names: list[str]

    @property
    def module(self) -> str:
        return self.names[0].rpartition(".")[0]

    @property
    def part(self) -> str:
        return self.names[0].rpartition(".")[2]


@dataclass
class _Found:
    """What the first pass found.

    Args:
        units: granularity -> module path -> how many of its units have changed.
        changed: module paths whose weight has changed; biases: whose bias has.
        whole: paths of modules that have changed and are of no type that can be adapted.
    """

    units: dict[Granularity, dict[str, int]] = field(default_factory=lambda: {kind: {} for kind in CANDIDATES})
    changed: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)


class _Difference:
    def __init__(self, base: Base, tuned: Base, progress: bool):
        self.model = skeleton(base)
        self.base, self.tuned, self.progress = weights_of(base), weights_of(tuned), progress
        self.base_name = getattr(self.model, "name_or_path", "") if isinstance(base, nn.Module) else str(base)
        self.tuned_name = self.tuned.where if isinstance(tuned, nn.Module) else Path(str(tuned)).name
        self.prefix = getattr(self.model, "base_model_prefix", "")
        self.layers = dict(_adaptable(self.model))
        self.parameters = _parameters(self.model)
        self.inexact = 0
        self.sketches: dict[str, str] = {}

    def delta(self, granularity: Granularity | None) -> SparseDelta:
        found = self._counted()
        whole = _whole_modules(self.model, found.whole)
        inside = [name for name in found.changed if _is_inside(name, whole)]
        names = [name for name in dict.fromkeys([*found.changed, *found.biases]) if name not in inside]
        if not names and not whole:
            raise ValueError(f"{self.tuned.where} has the weights of {self.base.where}: there is no difference")
        if not names:
            raise ValueError(f"only {', '.join(whole)} changed, which are no weights that a sparse delta can be of")
        kind = self._granularity(granularity, found, names)
        modules = self._taken(kind, names, with_bias=bool(found.biases))
        if self.inexact:
            warnings.warn(
                f"{self.inexact:,} entries of the tuned model are not what any float32 value added to the base's entry "
                "rounds to; they get the nearest. config.selection['inexact_entries'] has the number.",
                stacklevel=4,
            )
        like = FGGMConfig(base_model_name_or_path=self.base_name or None, task_type=self._task())
        like.modules_to_save = whole or None
        made_by = f"diff of {self.tuned_name} against its base"
        like.base_fingerprint = self.sketches
        delta = made_delta(like, kind, modules, made_by, self._whole_tensors(whole))
        assert delta.config.selection is not None
        delta.config.selection["inexact_entries"] = self.inexact
        return delta

    # First pass ----------------------------------------------------------------------------------

    def _counted(self) -> _Found:
        found = _Found()
        for parameter in tqdm(self.parameters, "Comparing", disable=not self.progress):
            before, after = self._pair(parameter)
            changed = before != after
            if not bool(changed.any()):
                continue
            layer = self.layers.get(parameter.module)
            if layer is None or parameter.part not in ("weight", "bias"):
                found.whole.append(parameter.module)
            elif parameter.part == "bias":
                found.biases.append(parameter.module)
            else:
                self._count(layer, parameter, changed, found)
        return found

    def _count(self, layer: FGGMLayer, parameter: _Parameter, changed: Tensor, found: _Found) -> None:
        matrix = layer.matrix(changed).float()
        for kind in CANDIDATES:
            found.units[kind][parameter.module] = int((kind.reduce(matrix) > 0).sum())
        found.changed.append(parameter.module)
        if len(parameter.names) > 1:
            others = ", ".join(name.rpartition(".")[0] for name in parameter.names[1:])
            warnings.warn(
                f"{parameter.module} has changed and shares its weight with {others}. Merging the delta changes both; "
                "as an adapter beside the base it would change the first only.",
                stacklevel=5,
            )

    def _granularity(self, wanted: Granularity | None, found: _Found, names: list[str]) -> Granularity:
        if found.biases:
            if wanted is not None and not wanted.has_bias:
                raise ValueError(
                    f"the bias of {found.biases[0]} has changed, and only granularity='row' contains bias entries, "
                    f"not '{wanted}'"
                )
            return Rows()
        if wanted is not None:
            return wanted

        def size(kind: Granularity) -> int:
            total = 0
            for module in names:
                shape = self.layers[module].weight_shape
                index_bytes = index_dtype(shape[0] * shape[1]).itemsize
                unit = VALUE_BYTES * kind.parameters_per_unit(shape) + index_bytes
                total += found.units[kind][module] * unit
            return total

        return min(CANDIDATES, key=size)

    # Second pass ---------------------------------------------------------------------------------

    def _taken(self, kind: Granularity, names: list[str], with_bias: bool) -> dict[str, ModuleDelta]:
        by_name = {parameter.names[0]: parameter for parameter in self.parameters}
        modules = {}
        for name in tqdm(names, "Taking what has changed", disable=not self.progress):
            layer = self.layers[name]
            before, after = (layer.matrix(tensor) for tensor in self._pair(by_name[f"{name}.weight"]))
            self.sketches[name] = sketch_weight(name, before, samples_per_weight(len(names))).to_text()
            units = kind.reduce((before != after).float()) > 0
            bias = by_name.get(f"{name}.bias") if with_bias else None
            if bias is not None:
                old_bias, new_bias = self._pair(bias)
                units |= old_bias != new_bias
            indices = units.nonzero().squeeze(1)
            values = self._exact(kind.gather(before, indices), kind.gather(after, indices), name)
            entries = None
            if bias is not None:
                entries = self._exact(old_bias[indices], new_bias[indices], f"{name}.bias")
            shape = layer.weight_shape
            modules[name] = ModuleDelta(kind, shape, indices.to(index_dtype(shape[0] * shape[1])), values, entries)
        return modules

    def _exact(self, before: Tensor, after: Tensor, where: str) -> Tensor:
        """Float32 values that, added to ``before`` and rounded to its dtype, give ``after`` where any do."""
        if not bool(torch.isfinite(after).all()) or not bool(torch.isfinite(before).all()):
            raise ValueError(f"{where}: a changed entry is NaN or infinite in one of the models")
        values = (after.double() - before.double()).float()
        values, missed = _reaching(values, lambda other: _added(before, other).double() == after.double())
        self.inexact += int(missed.sum())
        return values

    # Tensors -------------------------------------------------------------------------------------

    def _pair(self, parameter: _Parameter) -> tuple[Tensor, Tensor]:
        """One tensor of both models.

        Raises:
            ValueError: one of them has none of this name, or of another shape.
        """
        found = [self._one(weights, parameter) for weights in (self.base, self.tuned)]
        if found[0].shape != found[1].shape:
            raise ValueError(
                f"{parameter.names[0]} is {list(found[0].shape)} in {self.base.where} and {list(found[1].shape)} in "
                f"{self.tuned.where}: they are no base and its fine-tuned model"
            )
        return found[0], found[1]

    def _one(self, weights: Weights, parameter: _Parameter) -> Tensor:
        tensor = weights.find(parameter.names, self.prefix)
        if tensor is None:
            raise ValueError(
                f"{weights.where} has no {parameter.names[0]}, which a {type(self.model).__name__} has: it is another "
                "architecture, or its checkpoint names its weights in another way"
            )
        return tensor

    def _whole_tensors(self, whole: list[str]) -> dict[str, Tensor]:
        return {
            PREFIX + parameter.names[0]: self._one(self.tuned, parameter)
            for parameter in self.parameters
            if _is_inside(parameter.names[0], whole)
        }

    def _task(self) -> str | None:
        name = type(self.model).__name__
        return next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)


def _reaching(values: Tensor, reaches: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Replace a difference by a neighbouring float where its own rounding misses the target.

    Args:
        reaches: values -> booleans of the same shape, True where adding the value gives the target.

    Returns:
        The values, and a mask of the entries that neither they nor a neighbour reach.
    """
    missed = ~reaches(values)
    if missed.any():
        infinity = torch.full_like(values, torch.inf)
        for neighbour in (values.nextafter(infinity), values.nextafter(-infinity)):
            values = torch.where(missed & reaches(neighbour), neighbour, values)
        missed = ~reaches(values)
    return values, missed


def _added(before: Tensor, values: Tensor) -> Tensor:
    """As ``Granularity.added``."""
    wide = torch.promote_types(before.dtype, torch.float32)
    return (before.to(wide) + values.to(wide)).to(before.dtype)


def _adaptable(model: nn.Module) -> Iterator[tuple[str, FGGMLayer]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1:
            try:
                yield name, layer_of(module, name)
            except TypeError:
                continue  # it goes along whole, if it has changed


def _parameters(model: nn.Module) -> list[_Parameter]:
    """The parameters and the persistent buffers of a model; those that share a tensor as one."""
    buffers = dict(model.named_buffers())
    names: dict[int, list[str]] = {}
    tensors: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or name in buffers:
            names.setdefault(id(tensor), []).append(name)
    return [_Parameter(found) for found in names.values()]


def _whole_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The modules that go along whole: as PEFT finds them, by the ends of their paths."""
    if "" in names:
        raise ValueError("a parameter of the model itself has changed, which no adapter can hold")
    endings = tuple(dict.fromkeys(names))
    return [name for name, _ in model.named_modules() if name and endings and name.endswith(endings)]


def _is_inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
