"""Another task's delta into the place of a loaded one, in place: same tensors, same shapes, no recompilation.

PEFT's own ``hotswap_adapter`` goes by the ranks and alphas of LoRA's config. These two have its signatures.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import infer_device, load_peft_weights
from torch import Tensor, nn

from ..config import FGGMConfig
from ..files.tensors import MARK, PREFIX
from ..layer import FGGMLayer
from ..support import fggm_layers
from .padding import make_room_

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Put the adapter of a folder, or of the Hub, in the place of the loaded adapter ``adapter_name``.

    Values and indices are written into the tensors that are there. Where the sizes differ, the tensors get new ones,
    unless ``prepare_model_for_compiled_hotswap`` has made room that a smaller support fits in; a compiled model
    is then not compiled again. Modules that the new adapter lacks get a delta of zero.

    Args:
        model: has the adapter; may be compiled.
        model_name_or_path: where the new adapter is.
        adapter_name: the adapter's, as it stays.
        torch_device: where the file is loaded to; default: as PEFT infers it.
        kwargs: what PEFT takes to find a file, such as ``subfolder`` or ``revision``.

    Raises:
        ValueError: the adapter is merged, or the two are of different methods or granularities.
        RuntimeError: the new adapter has modules that the loaded one lacks.
        AdapterFileError: the file does not fit the model, or its supports the room. Nothing has changed.
    """
    model = getattr(model, "_orig_mod", model)
    where = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = PeftConfig.from_pretrained(model_name_or_path, **where)
    slot = _slot(model, adapter_name)
    _require_compatible(model.peft_config[adapter_name], config)
    state_dict = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **where)
    _complete_(state_dict, slot, adapter_name)
    old = model.peft_config[adapter_name]
    config.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = config  # it says what is in the file, and of which base
    try:
        set_peft_model_state_dict(model, state_dict, adapter_name)
    except Exception:
        model.peft_config[adapter_name] = old
        raise
    for layer in slot.values():
        layer.set_scale(adapter_name, 1.0)


def prepare_model_for_compiled_hotswap(model: nn.Module, *, density: float, adapter_name: str = "default") -> None:
    """Make room for supports of up to ``density`` of every module's units, so that hotswapping changes no shape.

    Supports are filled up with units whose values are zero: the model computes what it did. Call it after the first
    adapter is loaded and before ``torch.compile``.

    Raises:
        ValueError: a loaded support is larger already, or the model is compiled.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "call prepare_model_for_compiled_hotswap before torch.compile: it changes the adapter's shapes"
        )
    slot = _slot(model, adapter_name)
    if not any(layer.selected[adapter_name] for layer in slot.values()):
        raise ValueError(f"adapter {adapter_name!r} has no support yet: load an adapter, or call select_parameters")
    room = {name: math.ceil(density * _units(layer, adapter_name)) for name, layer in slot.items()}
    for name, layer in slot.items():
        if (k := len(layer.fggm_indices[adapter_name])) > room[name]:
            raise ValueError(
                f"adapter {adapter_name!r} has {k} of {_units(layer, adapter_name)} units in {name}, more than density "
                f"{density} leaves room for; give at least {k / _units(layer, adapter_name):.4f}"
            )
    for name, layer in slot.items():
        make_room_(layer, adapter_name, room[name])


def _units(layer: FGGMLayer, adapter_name: str) -> int:
    return layer.granularity[adapter_name].units(layer.weight_shape)


def _slot(model: Any, adapter_name: str) -> dict[str, FGGMLayer]:
    """The layers whose adapter is to be replaced."""
    slot = fggm_layers(model, adapter_name)
    if not slot:
        raise ValueError(f"there is no FGGM adapter {adapter_name!r} on this model to put another in the place of")
    if any(adapter_name in layer.merged_adapters for layer in slot.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before hotswapping it")
    return slot


def _require_compatible(old: FGGMConfig, new: PeftConfig) -> None:
    if not isinstance(new, FGGMConfig):
        raise ValueError(f"Incompatible PEFT types found: {old.peft_type.value} and {new.peft_type.value}")
    for name in ("granularity", "bias"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"Configs are incompatible: for {name}, {getattr(old, name)!r} != {getattr(new, name)!r}. "
                "Load the adapter under a name of its own instead."
            )


def _complete_(state_dict: dict[str, Tensor], slot: dict[str, FGGMLayer], adapter_name: str) -> None:
    """Refuse modules that the slot lacks, and give those that the file lacks a delta of zero."""
    here = {key.rpartition(MARK)[0].removeprefix(PREFIX) for key in state_dict if MARK in key}
    if unexpected := sorted(here - set(slot)):
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. "
            "Load the adapter under a name of its own instead."
        )
    for name in set(slot) - here:
        layer, key = slot[name], f"{PREFIX}{name}{MARK}"
        state_dict[f"{key}indices"] = layer.fggm_indices[adapter_name].clone()
        state_dict[f"{key}values"] = torch.zeros_like(layer.fggm_values[adapter_name])
        if adapter_name in layer.fggm_bias:
            state_dict[f"{key}bias"] = torch.zeros_like(layer.fggm_bias[adapter_name])
