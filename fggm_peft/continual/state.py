"""The part of a model that a run saves between tasks."""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from ..tuner.merging.sidecar import add_sidecars_, sidecars_of


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state of a model without quantized layers, which never change, and with the sidecars of these layers."""
    quantized = _quantized_layers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the state_dict and save_pretrained of the base omit")
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(quantized)}
    return {"tensors": tensors, "sidecars": sidecars_of(model)}


def restore_state_(model: nn.Module, state: dict[str, Any]) -> None:
    """Restore a state on a model as it was loaded, with the same adapters."""
    model.load_state_dict(state["tensors"], strict=not _quantized_layers(model))
    add_sidecars_(model, state["sidecars"])


def _quantized_layers(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of quantized layers."""
    options = get_quantization_kwargs(model)
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if resolve_quantization_backend(module, **options) is not None
    )
