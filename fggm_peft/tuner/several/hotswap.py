"""Replaces a loaded adapter by another one in place: same tensors, same shapes, no recompilation.

PEFT's own ``hotswap_adapter`` depends on LoRA's ranks and alphas. These functions have its signatures.

A compiled model needs constant shapes. So every support is padded to one size with units whose values are zero: it
stays sorted and unique, and the delta does not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import infer_device, load_peft_weights
from torch import Tensor, nn

from ...core.granularity import Granularity
from ...core.weight_delta import spread
from ..config import FGGMConfig
from ..files.tensors import MARK, PREFIX
from ..target import Target, Targets, find_targets

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the loaded adapter ``adapter_name`` by the adapter in a folder or on the Hub.

    Values and indices are written into the existing tensors. If the sizes differ, the tensors are replaced, unless
    ``prepare_model_for_compiled_hotswap`` has padded the supports; then a compiled model is not compiled again.
    Modules that the new adapter does not change get a delta of zero.

    Args:
        model: has the adapter; may be compiled.
        model_name_or_path: folder or Hub id of the new adapter.
        adapter_name: name of the adapter to replace; the name stays.
        torch_device: device that the file is loaded to; by default PEFT infers it.
        kwargs: PEFT's arguments to locate a file, such as ``subfolder`` or ``revision``.

    Raises:
        ValueError: the adapter is merged, or the two have different methods or granularities.
        RuntimeError: the new adapter changes modules that the loaded one does not.
        AdapterFileError: the file does not fit the model, or a support exceeds the padding. Nothing has changed then.
    """
    model = getattr(model, "_orig_mod", model)
    location = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = PeftConfig.from_pretrained(model_name_or_path, **location)
    targets = _replaceable(model, adapter_name)
    old = model.peft_config[adapter_name]
    _require_compatible(old, config)
    state_dict = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **location)
    _complete_(state_dict, targets)
    config.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = config  # it describes the file and its base
    try:
        set_peft_model_state_dict(model, state_dict, adapter_name)
    except Exception:
        model.peft_config[adapter_name] = old
        raise
    for target in targets.values():
        target.layer.set_scale(adapter_name, 1.0)


def prepare_model_for_compiled_hotswap(model: nn.Module, *, density: float, adapter_name: str = "default") -> None:
    """Pad supports to ``density`` of every module's units, so that hotswapping changes no shape.

    The padding has values of zero, so the model computes the same. Call it after the first adapter is loaded and
    before ``torch.compile``.

    Raises:
        ValueError: a loaded support is larger already, or the model is compiled.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "call prepare_model_for_compiled_hotswap before torch.compile: it changes the adapter's shapes"
        )
    targets = _replaceable(model, adapter_name)
    if not any(target.is_selected for target in targets.values()):
        raise ValueError(f"adapter {adapter_name!r} has no support yet: load an adapter, or call select_parameters")
    sizes = {path: math.ceil(density * target.units) for path, target in targets.items()}
    for path, target in targets.items():
        if (k := len(target.indices)) > sizes[path]:
            raise ValueError(
                f"adapter {adapter_name!r} has {k} of {target.units} units in {path}, more than density={density} "
                f"allows; use at least {k / target.units:.4f}"
            )
    for path, target in targets.items():
        _pad_(target, sizes[path])


def pad(tensors: Mapping[str, Tensor], granularity: Granularity, size: int) -> dict[str, Tensor]:
    """Fill up a support to ``size`` units; the lowest free units are added, with values of zero."""
    old = tensors["indices"]
    free = torch.ones(size, dtype=torch.bool, device=old.device)  # `size` units contain enough free ones
    free[old[old < size].long()] = False
    added = free.nonzero()[: size - len(old), 0].to(old.dtype)
    indices = torch.cat([old, added]).sort().values
    return {"indices": indices, "values": spread(tensors["values"], old, indices, granularity.unit_dim)}


def _pad_(target: Target, size: int) -> None:
    """Pad a loaded support, and record the size for the adapters that will replace it."""
    padded = pad({part: tensor.clone() for part, tensor in target.tensors.items()}, target.granularity, size)
    target.layer.resize_(target.adapter_name, size)
    for part, tensor in target.tensors.items():
        tensor.copy_(padded[part])
    target.layer.padded_sizes[target.adapter_name] = size
    target.layer.freeze_empty_()


def _replaceable(model: Any, adapter_name: str) -> Targets:
    targets = find_targets(model, adapter_name)
    if not targets:
        raise ValueError(f"this model has no FGGM adapter {adapter_name!r} to replace")
    if any(target.is_merged for target in targets.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before you hotswap it")
    return targets


def _require_compatible(old: FGGMConfig, new: PeftConfig) -> None:
    if not isinstance(new, FGGMConfig):
        raise ValueError(f"Incompatible PEFT types found: {old.peft_type.value} and {new.peft_type.value}")
    for name in ("granularity", "bias"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(
                f"Configs are incompatible: for {name}, '{getattr(old, name)}' != '{getattr(new, name)}'. "
                "Load the adapter under another name instead."
            )


def _complete_(state_dict: dict[str, Tensor], targets: Targets) -> None:
    """Raise for modules that have no target, and add a delta of zero for targets that the file does not change."""
    paths = {key.rpartition(MARK)[0].removeprefix(PREFIX) for key in state_dict if MARK in key}
    if unexpected := sorted(paths - set(targets)):
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. "
            "Load the adapter under another name instead."
        )
    for path in set(targets) - paths:
        tensors = {part: torch.zeros_like(tensor) for part, tensor in targets[path].tensors.items()}
        tensors["indices"] = targets[path].indices.clone()
        state_dict |= {f"{PREFIX}{path}{MARK}{part}": tensor for part, tensor in tensors.items()}
