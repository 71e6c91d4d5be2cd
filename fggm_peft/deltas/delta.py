"""``SparseDelta``: the sparse deltas of all weights of an adapter as plain tensors, without a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..core.fingerprint import WeightSketch
from ..core.granularity import Shape, UnitKind
from ..core.weight_delta import WeightDelta
from ..selection.select import active_adapter
from ..tuner.config import FGGMConfig
from ..tuner.files.atomic import complete_folder
from ..tuner.files.model_card import write_card
from ..tuner.files.reading import find_adapter, read_deltas
from ..tuner.files.saving import as_trained, encode, index_bytes
from ..tuner.files.tensors import MARK, PREFIX, is_trained_whole, split_key
from ..tuner.target import find_targets


@dataclass(frozen=True, eq=False, kw_only=True)
class ModuleDelta(WeightDelta):
    """The delta of one module's weight, with its shape ``(o, i)``."""

    shape: Shape

    def to(self, device: torch.device | None) -> ModuleDelta:
        """The same delta on another device."""
        return replace(self, indices=self.indices.to(device), values=self.values.to(device))


@dataclass(frozen=True, eq=False, repr=False)
class SparseDelta:
    """The sparse delta of a model: what an adapter changes in it.

    ``a + b``, ``a - b`` and ``0.5 * a`` are weighted sums; see ``compose``.

    Args:
        config: names the base model, and the granularity of all modules.
        modules: module path in the base model -> its delta, on the CPU.
        others: whole tensors of the adapter (``modules_to_save``, whole biases), by their names in its file.
    """

    config: FGGMConfig
    modules: dict[str, ModuleDelta]
    others: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Any, adapter_name: str | None = None, **hub: Any) -> SparseDelta:
        """Read a delta with the same checks as on loading an adapter.

        Args:
            source: a folder, a Hub id, a ``PeftModel`` with FGGM adapters, or a ``SparseDelta``, which is returned.
            adapter_name: the adapter of a ``PeftModel``; the active one by default.
            hub: ``revision``, ``token``, ``subfolder`` and similar arguments, for a Hub id.

        Raises:
            AdapterFileError: a file is missing or damaged.
            ValueError: the adapter belongs to another method, or the model has no adapter of this name.
        """
        if isinstance(source, SparseDelta):
            return source
        if isinstance(source, PeftModel):
            return _from_model(source, adapter_name)
        if not isinstance(source, (str, Path)):
            raise TypeError(f"a delta is read from a folder, a Hub id or a PeftModel, not a {type(source).__name__}")
        return from_file(*find_adapter(source, **hub))

    def save(self, folder: str | Path) -> Path:
        """Write the three files of a PEFT adapter, which ``PeftModel.from_pretrained`` loads.

        The folder never contains an incomplete adapter.
        """
        config = copy.copy(self.config)
        encoded = {path: encode(m.granularity, m.shape, config, vars(m), path) for path, m in self.modules.items()}
        config.describe_file(
            support_sizes={path: len(module.indices) for path, module in self.modules.items()},
            index_bytes=index_bytes(encoded),
            base_fingerprint=_fingerprint(config, self.modules),
        )
        tensors = {f"{PREFIX}{path}{MARK}{part}": t for path, parts in encoded.items() for part, t in parts.items()}
        tensors = {key: tensor.detach().contiguous() for key, tensor in {**tensors, **self.others}.items()}
        with complete_folder(Path(folder)) as temporary:
            save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
            write_card(temporary, config.of_file())
            config.save_pretrained(str(temporary))
        return Path(folder)

    @property
    def granularity(self) -> UnitKind:
        return self.config.granularity

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(module.values.numel() for module in self.modules.values())

    @property
    def density(self) -> float:
        """Number of values divided by the number of entries of the modules' weights."""
        entries = sum(module.shape[0] * module.shape[1] for module in self.modules.values())
        return self.parameters / entries if entries else 0.0

    @property
    def whole_tensors(self) -> list[str]:
        """The keys of tensors that replace those of the base, so that they are no differences."""
        return [key for key in self.others if is_trained_whole(key)]

    def __repr__(self) -> str:
        made_by = (self.config.selection or {}).get("made_by")
        return (
            f"SparseDelta({self.parameters:,} values in {self.granularity.plural} of {len(self.modules)} weights, "
            f"density {self.density:.2%}{f', made by {made_by}' if made_by else ''})"
        )

    def __add__(self, other: SparseDelta) -> SparseDelta:
        return _weighted_sum([self, other], [1.0, 1.0])

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        return _weighted_sum([self, other], [1.0, -1.0])

    def __mul__(self, factor: float) -> SparseDelta:
        return _weighted_sum([self], [factor])

    __rmul__ = __mul__

    def require_same_base(self, other: SparseDelta) -> None:
        """Raise ``ValueError`` if a weight has different shapes in the two deltas. Its values are not compared."""
        for path in self.modules.keys() & other.modules.keys():
            mine, theirs = self.modules[path].shape, other.modules[path].shape
            if mine != theirs:
                raise ValueError(
                    f"the deltas were made for different base models: {path} is {list(mine)} in one and "
                    f"{list(theirs)} in another"
                )


def from_file(config: FGGMConfig, file: Path) -> SparseDelta:
    """The delta in the files of an adapter; the arguments are the result of ``find_adapter``."""
    deltas, others = read_deltas(config, file)
    modules = {
        path: ModuleDelta(config.granularity.of_weight(path, shape), delta["indices"], delta["values"], shape=shape)
        for path, (shape, delta) in deltas.items()
    }
    return SparseDelta(_for_inference(config), modules, others)


def _weighted_sum(deltas: list[SparseDelta], weights: list[float]) -> Any:
    from .arithmetic import compose

    is_legal = all(isinstance(d, SparseDelta) for d in deltas) and all(isinstance(w, (int, float)) for w in weights)
    return compose(deltas, weights) if is_legal else NotImplemented


def new_delta(
    like: FGGMConfig,
    granularity: UnitKind,
    modules: Mapping[str, ModuleDelta],
    made_by: str,
    others: Mapping[str, Tensor] | None = None,
) -> SparseDelta:
    """A computed delta that targets exactly these modules. ``like`` is a config for the same base."""
    config = FGGMConfig(
        granularity=granularity,
        # PEFT compares a list of names with the ends of paths; a pattern is exact
        target_modules="|".join(re.escape(path) for path in modules),
        target_parameters=_parameters_of(like, modules) or None,
        bias=like.bias if others else "none",
        modules_to_save=like.modules_to_save if others else None,
        quantized_merge=like.quantized_merge,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
        task_type=like.task_type,
        inference_mode=True,
    )
    config.auto_mapping = copy.deepcopy(like.auto_mapping)
    config.base_fingerprint = _fingerprint(like, modules)
    delta = SparseDelta(config, dict(modules), dict(others or {}))
    config.selection = {"made_by": made_by, "parameters": delta.parameters, "density": delta.density}
    return delta


def _parameters_of(like: FGGMConfig, paths: Iterable[str]) -> list[str]:
    """The names for ``target_parameters`` of those modules that are experts or other parameters."""
    targeted = tuple(f".{name}" for name in like.target_parameters or ())
    names: dict[str, None] = {}
    for path in paths:
        stack, _, last = path.rpartition(".")
        name = stack if last.isdecimal() else path
        for key in (name, f"{name}.weight"):
            if f".{key}".endswith((*targeted, ".in_proj")):
                names[key] = None
    return list(names)


def _for_inference(config: FGGMConfig) -> FGGMConfig:
    config = copy.copy(config)
    config.inference_mode = True
    return config


def _fingerprint(like: FGGMConfig, modules: Mapping[str, ModuleDelta]) -> dict[str, str]:
    """The sketches of these modules in a config; for missing ones only the shape."""
    sketches = like.base_fingerprint or {}
    return {path: sketches.get(path, WeightSketch(module.shape).to_text()) for path, module in modules.items()}


def _from_model(model: PeftModel, adapter_name: str | None) -> SparseDelta:
    if adapter_name is None and len(active := model.active_adapters) != 1:
        raise ValueError(f"the model has the active adapters {', '.join(active)}; pass one of them as adapter_name=")
    name, config = active_adapter(model, adapter_name)
    modules = {}
    for path, target in find_targets(model, name).items():
        indices, values = _copied(target.indices), _copied(target.values)
        modules[path] = ModuleDelta(target.granularity, indices, values, shape=target.shape)
    with as_trained(model):
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    others = {key: _copied(tensor) for key, tensor in state.items() if split_key(key) is None}
    return SparseDelta(_for_inference(config.of_file()), modules, others)


def _copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU that does not change when the model trains on."""
    return tensor.detach().to("cpu", copy=True)
