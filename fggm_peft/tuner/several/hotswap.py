"""Replaces a loaded adapter by another one in place: the end of PEFT's ``hotswap_adapter``."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from torch import Tensor

from ..files.tensors import MARK, PREFIX, delta_keys, split_key
from ..hosts.sharding import without_wrappers
from ..target import Targets, find_targets


def swap_in_place(model: Any, state_dict: dict[str, Tensor], adapter_name: str, config: PeftConfig) -> None:
    """Replace a loaded adapter by the tensors of a file, whose keys contain the adapter's name.

    Values and indices are written into the existing tensors if the sizes are equal; then a compiled model is not
    compiled again. Modules that the new adapter does not change get a delta of zero.

    Raises:
        ValueError: the model has no such adapter, or it is merged.
        RuntimeError: the new adapter changes modules that the loaded one does not.
        AdapterFileError: the file does not fit the model. Nothing has changed then.
    """
    model = without_wrappers(model)
    targets = find_targets(model, adapter_name)
    if not targets:
        raise ValueError(f"this model has no FGGM adapter {adapter_name!r} to replace")
    if any(target.is_merged for target in targets.values()):
        raise ValueError(f"adapter {adapter_name!r} is merged; call unmerge_adapter() before you hotswap it")
    plain = {key: key.removesuffix(f".{adapter_name}") for key in state_dict}
    state_dict = {plain[key] if split_key(plain[key]) else key: tensor for key, tensor in state_dict.items()}
    _complete_(state_dict, targets)
    old = model.peft_config[adapter_name]
    config.inference_mode = old.inference_mode
    model.peft_config[adapter_name] = config  # it describes the file and its base
    try:
        set_peft_model_state_dict(model, state_dict, adapter_name)
    except Exception:
        model.peft_config[adapter_name] = old
        raise
    for target in targets.values():
        target.layer.set_scale(adapter_name, 1.0)


def _complete_(state_dict: dict[str, Tensor], targets: Targets) -> None:
    """Raise for modules that have no target, and add a delta of zero for targets that the file does not change."""
    paths = set(delta_keys(state_dict))
    if unexpected := sorted(paths - set(targets)):
        raise RuntimeError(
            f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}. "
            "Load the adapter under another name instead."
        )
    for path in set(targets) - paths:
        target = targets[path]
        tensors = {"indices": target.indices.clone(), "values": torch.zeros_like(target.values.detach())}
        state_dict |= {f"{PREFIX}{path}{MARK}{part}": tensor for part, tensor in tensors.items()}
