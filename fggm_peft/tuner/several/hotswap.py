"""Replaces a loaded adapter by another one in place: same tensors, same shapes, no recompilation.

PEFT's ``hotswap_adapter`` works too, for the active adapter of a ``PeftModel``.
Adapters with the same number of units in each module have the same shapes; a compiled model is then not compiled again.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import infer_device, load_peft_weights
from torch import Tensor, nn

from ..config import FGGMConfig
from ..files.tensors import MARK, PREFIX, delta_keys, split_key
from ..hosts.sharding import without_wrappers
from ..target import Targets, find_targets

_HUB_ARGUMENTS = ("subfolder", "revision", "cache_dir", "token")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the loaded adapter ``adapter_name`` by the adapter in a folder or on the Hub.

    Values and indices are written into the existing tensors, which are replaced if the sizes differ. Modules that
    the new adapter does not change get a delta of zero.

    Args:
        model: has the adapter; may be compiled.
        model_name_or_path: folder or Hub id of the new adapter.
        adapter_name: name of the adapter to replace; the name stays.
        torch_device: device that the file is loaded to; by default PEFT infers it.
        kwargs: PEFT's arguments to locate a file, such as ``subfolder`` or ``revision``.

    Raises:
        ValueError: the adapter is merged, or the two have different methods or granularities.
        RuntimeError: the new adapter changes modules that the loaded one does not.
        AdapterFileError: the file does not fit the model. Nothing has changed then.
    """
    location = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = PeftConfig.from_pretrained(model_name_or_path, **location)
    state_dict = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **location)
    swap_in_place(model, state_dict, adapter_name, config)


def swap_in_place(model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: PeftConfig) -> None:
    """Replace a loaded adapter by the tensors of a file, whose keys may contain the adapter's name already."""
    model = without_wrappers(model)
    targets = _replaceable(model, adapter_name)
    old = model.peft_config[adapter_name]
    _require_compatible(old, config)
    plain = {key: key.removesuffix(f".{adapter_name}") for key in state_dict}
    state_dict = {plain[key] if split_key(plain[key]) else key: tensor for key, tensor in state_dict.items()}
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
    paths = set(delta_keys(state_dict))
    if unexpected := sorted(paths - set(targets)):
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. "
            "Load the adapter under another name instead."
        )
    for path in set(targets) - paths:
        tensors = {part: torch.zeros_like(tensor) for part, tensor in targets[path].tensors.items()}
        tensors["indices"] = targets[path].indices.clone()
        state_dict |= {f"{PREFIX}{path}{MARK}{part}": tensor for part, tensor in tensors.items()}
