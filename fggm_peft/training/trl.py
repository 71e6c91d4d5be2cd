"""What TRL does to adapters that does not fit ours, mended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..selection.select import active_adapter
from ..tuner.layer import FGGMLayer
from ..tuner.support import fggm_layers


def keep_values_wide_(model: Any) -> None:
    """Undo TRL's rounding of a quantized model's trainable parameters to bfloat16.

    That follows QLoRA, whose factors are of the size of weights. bfloat16 adds nothing to a value that is 256 to
    512 steps long: of 1000 equal steps 39 to 50 % arrive. An adapter whose config asks for bfloat16
    (``training_dtype``), for an optimizer that rounds stochastically, keeps it.
    """
    for layer in model.modules():
        if isinstance(layer, FGGMLayer) and layer.quantization_backend is not None:
            for name in layer.fggm_values:
                if model.peft_config[name].training_dtype != "bfloat16":
                    _widen_(layer.trained(name))


def _widen_(parameters: Iterable[nn.Parameter]) -> None:
    for values in parameters:
        if values.requires_grad and values.dtype in (torch.bfloat16, torch.float16):
            values.data = values.data.float()


def fill_reference_(model: Any) -> None:
    """Make TRL's adapter "ref" the copy of the trained adapter that it is meant to be.

    TRL (1.16) adds it with the active adapter's config and copies parameters whose names have ".default." in
    them; ours end with the adapter's name, and supports are buffers. Left empty it would be the base model.
    """
    name, config = active_adapter(model, None)
    if name == "ref" or model.peft_config.get("ref") is not config:
        return
    for layer in fggm_layers(model, "ref").values():
        layer.set_support("ref", layer.fggm_indices[name])
        layer.selected["ref"] = layer.selected[name]
        for copy, original in zip(layer.trained("ref"), layer.trained(name), strict=True):
            copy.data.copy_(original.data)
