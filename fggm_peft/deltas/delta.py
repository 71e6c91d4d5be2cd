"""``SparseDelta``: the deltas of a whole adapter as plain tensors, without a model.

A delta of a model is a delta of each of its targeted weights; all of one model have one granularity, which is that of
the config.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.fingerprint import WeightSketch, sketches_from
from ..core.granularity import Granularity, Shape
from ..core.weight_delta import WeightDelta
from ..tuner.config import FGGMConfig
from ..tuner.files.atomic import complete_folder
from ..tuner.files.reading import contents_of, find_adapter
from ..tuner.files.saving import UntrainedAdapterWarning, as_trained, encoded, index_shapes
from ..tuner.files.tensors import MARK, PREFIX
from ..tuner.support import fggm_layers
from .meta_base import Base, skeleton

_CARD = """\
---
base_model: {base}
library_name: peft
tags:
- fggm
---

# Sparse delta

{description}

```python
import fggm_peft  # registers the adapter type with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path or Hub id of this adapter")  # base: {base}
```
"""


@dataclass(frozen=True, eq=False)
class ModuleDelta:
    """The delta of one module's weight ``[o, i]``, on the CPU.

    Args:
        granularity: kind of unit.
        shape: ``(o, i)``.
        indices: ``[k]`` integers, sorted, unique.
        values: ``granularity.values_shape(shape, k)``.
        bias: ``[k]``, what is added to the bias of the chosen rows, or None.
    """

    granularity: Granularity
    shape: Shape
    indices: Tensor
    values: Tensor
    bias: Tensor | None = None

    def scaled(self, scale: float = 1.0) -> WeightDelta:
        """As the core takes it, counting ``scale`` times."""
        return WeightDelta(self.granularity, self.indices, self.values, scale)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their part of a file."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"indices": self.indices, "values": self.values, **bias}


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """The sparse delta of a model, or of what an adapter has changed in it.

    Args:
        config: says of which base model it is, and the granularity of all modules.
        modules: module path within the base model -> its delta.
        others: whole tensors that travel with the adapter (``modules_to_save``, whole biases), by their names in
            its file.
    """

    config: FGGMConfig
    modules: dict[str, ModuleDelta]
    others: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Any, base: Base | None = None, adapter_name: str | None = None, **hub: Any) -> SparseDelta:
        """Read a delta, checked as on loading.

        Args:
            source: a folder, a Hub id, a ``PeftModel`` with FGGM adapters, or a ``SparseDelta``, which is returned.
            base: the base model, or its folder or Hub id, for the shapes of its weights; by default the one that the
                adapter's config names. Not needed where the file or the model tells them.
            adapter_name: which adapter of a ``PeftModel``; the active one by default.
            hub: ``revision``, ``token``, ``subfolder`` and the like, for a delta on the Hub.

        Raises:
            AdapterFileError: a file is damaged, or does not fit the base.
            ValueError: it is no FGGM adapter, or the shapes of its weights cannot be found out.
        """
        if isinstance(source, SparseDelta):
            return source
        if isinstance(source, PeftModel):
            return _of_model(source, adapter_name)
        if not isinstance(source, (str, Path)):
            raise TypeError(f"a delta is read from a folder, a Hub id or a PeftModel, not a {type(source).__name__}")
        return _of_file(source, base, hub)

    def save(self, folder: str | Path) -> Path:
        """Write the three files of a PEFT adapter, whole or not at all; ``PeftModel.from_pretrained`` loads them."""
        folder = Path(folder)
        with complete_folder(folder) as partial:
            base = self.config.base_model_name_or_path or "unknown"
            card = _CARD.format(base=base, description=self.description())
            (partial / "README.md").write_text(card, encoding="utf-8")
            _write(self, partial)
        return folder

    @property
    def granularity(self) -> Granularity:
        return self.config.granularity

    @property
    def parameters(self) -> int:
        """How many values it has, bias entries included."""
        return sum(m.values.numel() + (0 if m.bias is None else m.bias.numel()) for m in self.modules.values())

    @property
    def density(self) -> float:
        """Share of the entries of its modules' weights that it holds."""
        entries = sum(m.shape[0] * m.shape[1] for m in self.modules.values())
        return sum(m.values.numel() for m in self.modules.values()) / entries if entries else 0.0

    @property
    def bytes(self) -> int:
        """What its tensors take, the whole ones included."""
        tensors = [t for module in self.modules.values() for t in module.tensors.values()]
        return sum(t.numel() * t.element_size() for t in [*tensors, *self.others.values()])

    def description(self) -> str:
        """A sentence for people."""
        made = (self.config.selection or {}).get("made_by")
        how = f" Made by {made}." if made else ""
        return (
            f"{self.parameters:,} values on {self.config.granularity}s of {len(self.modules)} weights, "
            f"{self.density:.2%} of their entries.{how}"
        )

    def require_same_base(self, other: SparseDelta) -> None:
        """Raise ``ValueError`` where a weight of both has not one shape."""
        for name in self.modules.keys() & other.modules.keys():
            mine, theirs = self.modules[name].shape, other.modules[name].shape
            if mine != theirs:
                raise ValueError(
                    f"the deltas were made for different base models: {name} is {list(mine)} in one and "
                    f"{list(theirs)} in another"
                )


def made_delta(
    like: FGGMConfig,
    granularity: str | Granularity,
    modules: Mapping[str, ModuleDelta],
    made_by: str,
    others: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> SparseDelta:
    """A delta that was computed, with a config of its own: that of no selection, for these modules and no others.

    Args:
        like: the config of a delta for the same base; what it says of the base is taken over.
        made_by: what the card says.
        others: whole tensors.
        settings: further fields of the config.
    """
    has_bias = any(module.bias is not None for module in modules.values())
    whole: dict[str, Any] = {"modules_to_save": like.modules_to_save} if others else {}
    if others and like.bias == "all":
        whole["bias"] = "all"
    config = FGGMConfig(
        **{
            "granularity": granularity,
            # names would be taken for the ends of paths; a pattern is exact
            "target_modules": "|".join(re.escape(name) for name in modules),
            "bias": "fggm_only" if has_bias else "none",
            "quantized_merge": like.quantized_merge,
            "base_model_name_or_path": like.base_model_name_or_path,
            "revision": like.revision,
            "task_type": like.task_type,
            "inference_mode": True,
            **whole,
            **settings,
        }
    )
    config.auto_mapping = copy.deepcopy(like.auto_mapping)
    config.base_fingerprint = _fingerprint(like, modules)
    delta = SparseDelta(config, dict(modules), dict(others or {}))
    config.selection = {"made_by": made_by, "parameters": delta.parameters, "density": delta.density}
    return delta


def _of_file(source: str | Path, base: Base | None, hub: Mapping[str, Any]) -> SparseDelta:
    adapter = Path(source).expanduser() if Path(source).expanduser().is_dir() else str(source)
    config, file = find_adapter(adapter, **hub)
    contents = contents_of(config, file, _base_for(config, str(source), base))
    granularity = config.granularity
    modules = {name: ModuleDelta(granularity, contents.shapes[name], **d) for name, d in contents.deltas.items()}
    return SparseDelta(_for_inference(contents.config), modules, contents.others)


def _base_for(config: FGGMConfig, where: str, base: Base | None) -> nn.Module | None:
    """The base to read the file with: the one given, none, or the one that the config names."""
    if base is None and config.base_fingerprint:
        return None  # it says the shapes
    revision = None if base is not None else config.revision
    base = base if base is not None else config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"{where} says neither the shapes of the weights nor a base model that could: pass the base model, or its "
            "folder or Hub id, as base="
        )
    return skeleton(base, config, revision=revision)


def _for_inference(config: FGGMConfig) -> FGGMConfig:
    """A copy of the config with ``inference_mode=True``."""
    config = copy.copy(config)
    config.inference_mode = True
    return config


def _write(delta: SparseDelta, folder: Path) -> None:
    """The configuration and the tensors, as an adapter's that PEFT saves."""
    config, kind = copy.copy(delta.config), delta.granularity
    written = {
        name: encoded(kind, module.shape, config, module.tensors, name) for name, module in delta.modules.items()
    }
    config.describe_file({n: len(m.indices) / max(1, kind.units(m.shape)) for n, m in delta.modules.items()})
    config.support_sizes = {name: len(module.indices) for name, module in delta.modules.items()}
    config.index_shapes = index_shapes(written)
    config.base_fingerprint = _fingerprint(config, delta.modules)
    tensors = {f"{PREFIX}{name}{MARK}{part}": t for name, parts in written.items() for part, t in parts.items()}
    tensors = {key: t.detach().contiguous() for key, t in {**tensors, **delta.others}.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(str(folder))


def _fingerprint(like: FGGMConfig, modules: Mapping[str, ModuleDelta]) -> dict[str, str]:
    """The base's, of these modules; of those that it does not have, the shape."""
    kept = sketches_from(like.base_fingerprint or {})
    found = {}
    for name, module in modules.items():
        sketch = kept.get(name)
        found[name] = (sketch if sketch and sketch.shape == module.shape else WeightSketch(module.shape)).to_text()
    return found


def _of_model(model: PeftModel, adapter_name: str | None) -> SparseDelta:
    name = adapter_name if adapter_name is not None else _active_adapter(model)
    if name not in model.peft_config:
        raise ValueError(f"there is no adapter {name!r} on this model; it has {', '.join(model.peft_config)}")
    config = model.peft_config[name]
    if not isinstance(config, FGGMConfig):
        raise ValueError(f"the adapter {name!r} is a {config.peft_type} adapter, not FGGM")
    modules = {}
    for path, layer in fggm_layers(model, name).items():
        modules[path] = ModuleDelta(
            layer.granularity[name],
            layer.weight_shape,
            _kept(layer.fggm_indices[name]),
            _kept(layer.fggm_values[name]),
            _kept(layer.fggm_bias[name]) if name in layer.fggm_bias else None,
        )
    with as_trained(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAdapterWarning)
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    others = {key: _kept(tensor) for key, tensor in state.items() if MARK not in key}
    return SparseDelta(_for_inference(config), modules, others)


def _active_adapter(model: PeftModel) -> str:
    names = model.active_adapters
    if len(names) != 1:
        raise ValueError(f"the model has the active adapters {', '.join(names)}; say which one by adapter_name=")
    return names[0]


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the CPU: the delta stays what it is when the model trains on."""
    return tensor.detach().to("cpu", copy=True)


def moved_to(module: ModuleDelta, device: torch.device) -> ModuleDelta:
    """The delta on the device of the weight that it is about to change."""
    bias = None if module.bias is None else module.bias.to(device)
    return replace(module, indices=module.indices.to(device), values=module.values.to(device), bias=bias)
