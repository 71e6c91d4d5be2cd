"""The exact sparse delta between two models: the changes that fine-tuning made.

The weights are read twice, one tensor of each model at a time, so that no model is in memory as a whole. The first pass
counts the changed entries, the second collects them.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.fingerprint import samples_per_weight, sketch_weight
from ..core.granularity import Columns, Elements, Rows, UnitKind, granularity_from, sum_rounded_once
from ..core.index_codec import index_dtype
from ..selection.likelihood import task_type_of
from ..tuner.config import FGGMConfig
from ..tuner.files.reading import adaptable_layer
from ..tuner.files.tensors import BASE_PART, PREFIX
from ..tuner.layer import FGGMLayer
from ..tuner.parameters import stacked_layers
from .base_model import Base, Weights, names_of_tensors, settings_of, skeleton, variants
from .delta import ModuleDelta, SparseDelta, new_delta

CANDIDATES = (Rows(), Columns(), Elements())
"""The granularities that ``diff`` chooses from."""
VALUE_BYTES = 4

_IRRELEVANT = {"name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
_IRRELEVANT |= {"attn_implementation", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}


def diff(base: Base, tuned: Base, granularity: str | UnitKind | None = None) -> SparseDelta:
    """The delta that must be added to ``base`` to get ``tuned``.

    If the values are added to the base in float32 and rounded once, as merging does, the result equals the tuned weight
    bit for bit wherever a float32 value exists that gives it. ``config.selection["inexact_entries"]`` counts the other
    entries, and ``config_differences`` contains the settings in which the models' configs differ. Changed norms are
    included as a whole, as ``modules_to_save``. If a bias of another module has changed, every bias is included
    (``bias="all"``).

    Args:
        base, tuned: models, or folders or Hub ids of checkpoints in safetensors files.
        granularity: of the delta; by default the one that takes the fewest bytes.

    Raises:
        ValueError: the models have different architectures, the tuned model has tensors of its own, nothing has
            changed, or a changed entry is not finite.
    """
    kind = None if granularity is None else granularity_from(granularity)
    with torch.no_grad():
        return _Comparison(base, tuned).delta(kind)


class _Comparison:
    def __init__(self, base: Base, tuned: Base):
        self.model = skeleton(base)
        self.base, self.tuned = Weights(base), Weights(tuned)
        self.base_name = getattr(self.model, "name_or_path", "") if isinstance(base, nn.Module) else str(base)
        self.tuned_name = self.tuned.where if isinstance(tuned, nn.Module) else Path(str(tuned)).name
        self.prefix = getattr(self.model, "base_model_prefix", "")
        self.layers = _adaptable_layers(self.model)
        self.parameters = names_of_tensors(self.model)
        self.names = {path: weight_name(path, layer) for path, layer in self.layers.items()}
        self.parts: dict[str, list[str]] = defaultdict(list)  # name of a tensor -> paths of the layers in it
        for path, name in self.names.items():
            self.parts[name].append(path)
        # paths of modules whose weight or bias has changed, and of changed modules that cannot be adapted
        self.weights: list[str] = []
        self.biases: list[str] = []
        self.others: list[str] = []
        self.sizes = dict.fromkeys(CANDIDATES, 0)  # bytes of the delta
        self.sketches: dict[str, str] = {}
        self.inexact = 0
        self.other_settings = _config_differences(self.model, tuned)

    def delta(self, granularity: UnitKind | None) -> SparseDelta:
        self._count()
        self._require_covered()
        whole = _whole_modules(self.model, self.others)
        paths = [path for path in self.weights if not _is_inside(path, whole)]
        if not (paths or whole or self.biases):
            raise ValueError(f"there is no difference: {self.tuned.where} has the weights of {self.base.where}")
        if not paths:
            names = [*whole, *(f"{path}.bias" for path in self.biases)]
            raise ValueError(f"only {', '.join(names)} differ, and a sparse delta must change a weight matrix")
        granularity = granularity or min(CANDIDATES, key=self.sizes.__getitem__)
        modules = {
            path: self._changes(path, granularity, samples_per_weight(len(paths)))
            for path in tqdm(paths, "Collecting the changes", disable=None)
        }
        if self.inexact:
            problem = "entries cannot be reproduced exactly by a float32 delta; the nearest value is stored"
            warnings.warn(f"{self.inexact:,} {problem}", stacklevel=4)
        if self.other_settings:
            problem = f"the configs of the models differ in {', '.join(self.other_settings)}"
            warnings.warn(f"{problem}, which a delta does not change", stacklevel=4)
        like = FGGMConfig(
            base_model_name_or_path=self.base_name or None,
            task_type=task_type_of(self.model),
            modules_to_save=whole or None,
        )
        like.base_fingerprint = self.sketches
        like.target_parameters = list({self.names[path]: None for path in paths if self.layers[path].is_expert})
        others = {PREFIX + name: self._read(self.tuned, name) for name in self.parameters if _is_inside(name, whole)}
        if self.biases:
            like.bias = "all"
            others |= self._biases(paths)
        delta = new_delta(like, granularity, modules, f"diff of {self.tuned_name} and its base", others)
        findings: Any = {"inexact_entries": self.inexact, "config_differences": self.other_settings}
        delta.config.selection = {**(delta.config.selection or {}), **findings}
        return delta

    def _require_covered(self) -> None:
        """Raise ``ValueError`` if the tuned model has a tensor of its own, which the comparison would omit."""
        stored = self.tuned.stored
        shared: dict[str, str] = {}
        for aliases in self.parameters.values():
            names = [name for name in variants(aliases, self.prefix) if name in stored]
            shared |= dict.fromkeys(names, names[0] if names else "")  # the comparison reads the first
        for name in stored:
            # old checkpoints contain inv_freq, which models compute
            if name.endswith("rotary_emb.inv_freq") or shared.get(name) == name:
                continue
            twin = self.tuned.find([shared[name]]) if name in shared else self.base.find([name])
            if twin is None or not torch.equal(self.tuned.read(name), twin):
                reason = f"the base shares it with {shared[name]}" if name in shared else "a delta cannot add it"
                raise ValueError(f"{self.tuned.where} has a {name} of its own: {reason}")

    def _count(self) -> None:
        """The first pass: which tensors have changed, and the size of the delta in each granularity."""
        for name in tqdm(self.parameters, "Comparing", disable=None):
            before, after = self._pair(name)
            changed = before != after
            if not bool(changed.any()):
                continue
            path, _, part = name.rpartition(".")
            if part == "bias" and path in self.layers:
                self.biases.append(path)
            elif name not in self.parts:
                self.others.append(path)
            else:
                self.weights += self.parts[name]
                for layer in (self.layers[path] for path in self.parts[name]):
                    matrix, (o, i) = layer.part(changed).float(), layer.weight_shape
                    for kind in CANDIDATES:
                        unit = VALUE_BYTES * kind.parameters_per_unit((o, i)) + index_dtype(o * i).itemsize
                        self.sizes[kind] += int((kind.reduce(matrix) > 0).sum()) * unit
                if tied := [other.rpartition(".")[0] for other in self.parameters[name] if other != name]:
                    warnings.warn(
                        f"{path} has changed and shares its weight with {', '.join(tied)}. Merging the delta changes "
                        "both; an adapter that is not merged changes only the first.",
                        stacklevel=5,
                    )

    def _changes(self, path: str, kind: UnitKind, samples: int) -> ModuleDelta:
        """The second pass: the changed units of one weight."""
        layer, shape = self.layers[path], self.layers[path].weight_shape
        granularity = kind.of_weight(path, shape)
        if not granularity.supports(shape):
            raise ValueError(
                f"granularity='{granularity}' does not fit {path}, whose weight has the shape {list(shape)}"
            )
        before, after = (layer.part(tensor) for tensor in self._pair(self.names[path]))
        self.sketches[path] = sketch_weight(path, before, samples).to_text()
        indices = (granularity.reduce((before != after).float()) > 0).nonzero().squeeze(1)
        values = self._exact(granularity.gather(before, indices), granularity.gather(after, indices), path)
        return ModuleDelta(granularity, indices.to(index_dtype(shape[0] * shape[1])), values, shape=shape)

    def _biases(self, adapted: list[str]) -> dict[str, Tensor]:
        """Every bias of the tuned model, by its name in an adapter file that adapts the given modules."""
        biases = {}
        for name in self.parameters:
            path, _, part = name.rpartition(".")
            if part == "bias":
                part = BASE_PART + part if path in adapted else f".{part}"
                biases[PREFIX + path + part] = self._read(self.tuned, name)
        return biases

    def _exact(self, before: Tensor, after: Tensor, where: str) -> Tensor:
        """Float32 values that give ``after`` when they are added to ``before`` and rounded to its dtype."""
        if not bool(torch.isfinite(after).all()) or not bool(torch.isfinite(before).all()):
            raise ValueError(f"{where}: a changed entry is NaN or infinite in one of the models")
        values = (after.double() - before.double()).float()

        def missed(values: Tensor) -> Tensor:
            return sum_rounded_once(before, values, 1.0).double() != after.double()

        for direction in (torch.inf, -torch.inf):  # the difference's own rounding may miss by one step
            neighbor = values.nextafter(torch.full_like(values, direction))
            values = torch.where(missed(values) & ~missed(neighbor), neighbor, values)
        self.inexact += int(missed(values).sum())
        return values

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """One tensor of both models."""
        before, after = self._read(self.base, name), self._read(self.tuned, name)
        if before.shape != after.shape:
            raise ValueError(
                f"{name} is {list(before.shape)} in {self.base.where} and {list(after.shape)} in "
                f"{self.tuned.where}: they are not a base and its fine-tuned model"
            )
        return before, after

    def _read(self, weights: Weights, name: str) -> Tensor:
        tensor = weights.find(self.parameters[name], self.prefix)
        if tensor is None:
            raise ValueError(
                f"{weights.where} has no {name}, which a {type(self.model).__name__} has: it has another "
                "architecture, or its checkpoint uses other names"
            )
        return tensor


def _config_differences(model: nn.Module, tuned: Base) -> list[str]:
    """The settings in which the configs of two models differ, without those that do not change the outputs."""
    other: Any = getattr(tuned, "config", None)
    if not isinstance(tuned, nn.Module):
        with suppress(ValueError):  # a folder may contain only weights
            other = settings_of(str(tuned))
    configs: list[Any] = [getattr(model, "config", None), other]
    if not all(hasattr(config, "to_dict") for config in configs):
        return []
    ours, theirs = (config.to_dict() for config in configs)
    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if ours.get(name) != theirs.get(name) and name.strip("_") not in _IRRELEVANT]


def _adaptable_layers(model: nn.Module) -> dict[str, FGGMLayer]:
    layers = {}
    for path, module in model.named_modules():
        is_matrix = isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
        layer = adaptable_layer(module, path) if is_matrix else None
        if layer is not None:  # other modules are included as a whole if they change
            layers[path] = layer
        elif hasattr(module, "num_experts"):
            layers |= stacked_layers(module, path)
    return layers


def weight_name(path: str, layer: FGGMLayer) -> str:
    """The name of the tensor that contains a layer's weight."""
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Module):
        return f"{path}.weight"
    return f"{path.rsplit('.', 1 if base.index is None else 2)[0]}.{base.name}"


def _whole_modules(model: nn.Module, paths: list[str]) -> list[str]:
    """The modules to include as a whole. PEFT finds modules by the ends of their paths."""
    if "" in paths:
        raise ValueError("a parameter of the model itself has changed, which no adapter can hold")
    endings = tuple(dict.fromkeys(paths))
    return [path for path, _ in model.named_modules() if path and endings and path.endswith(endings)]


def _is_inside(path: str, modules: list[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
