"""Layers whose weight accelerate offloads to the CPU or the disk; a forward pass loads it to a device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_offloaded(layer: nn.Module) -> bool:
    hook = layer.__dict__.get("_hf_hook")  # much faster than getattr, which also searches parameters and submodules
    return hook is not None and getattr(hook, "offload", False)


def execution_device(layer: nn.Module) -> torch.device:
    """The device on which an offloaded layer computes."""
    return torch.device(layer._hf_hook.execution_device)


def offloaded_weight(layer: nn.Module) -> Tensor | None:
    """The offloaded weight of a layer, read-only; None if the weight is loaded."""
    return layer._hf_hook.weights_map["weight"] if is_offloaded(layer) and layer.weight.is_meta else None


def require_offloading_in_place(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``PeftModel.from_pretrained`` removed accelerate's hooks from a base on disk.

    It dispatches the model again after loading, and would look for the adapter's values in the files of the base.
    """
    on_disk = "disk" in (getattr(model, "hf_device_map", None) or {}).values()
    if on_disk and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "PeftModel.from_pretrained cannot load an FGGM adapter onto a base that is offloaded to disk. Use "
            "model = get_peft_model(base, FGGMConfig.from_pretrained(adapter)) and then "
            "set_peft_model_state_dict(model, load_peft_weights(adapter)), both from peft."
        )
