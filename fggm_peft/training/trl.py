"""Workarounds for two TRL behaviors that break FGGM adapters."""

from __future__ import annotations

from typing import Any

import torch

from ..selection.select import active_adapter
from ..tuner.layer import FGGMLayer
from ..tuner.target import find_targets


def restore_float32_(model: Any) -> None:
    """Undo TRL's conversion of a quantized model's trainable parameters to bfloat16.

    TRL does so because QLoRA does. A delta starts at zero and grows by small steps. In bfloat16, a step has no effect
    on a value that is 256 to 512 times as large: of 1000 equal steps, 39 to 50 % have an effect. An adapter with
    ``training_dtype="bfloat16"`` is not changed.
    """
    for layer in model.modules():
        if not isinstance(layer, FGGMLayer) or layer.quantization_backend is None:
            continue
        for name in layer.fggm_values:
            if model.peft_config[name].training_dtype != "bfloat16":
                values = layer.fggm_values[name]
                if values.requires_grad and values.dtype in (torch.bfloat16, torch.float16):
                    values.data = values.data.float()


def copy_to_reference_(model: Any) -> None:
    """Copy the trained adapter to "ref", TRL's adapter for the reference model.

    TRL (1.16) adds "ref" with the active adapter's config and copies parameters with ".default." in their names. FGGM's
    parameter names end with the adapter's name, and supports are buffers, so TRL would leave "ref" without values. An
    adapter "ref" that has values is not changed.
    """
    name, _ = active_adapter(model, None)
    trained, references = find_targets(model, name), find_targets(model, "ref")
    if name == "ref" or any(reference.values.any() for reference in references.values()):
        return
    for path, reference in references.items() if references.keys() == trained.keys() else ():
        reference.layer.set_support("ref", trained[path].indices)
        reference.layer.selected["ref"] = trained[path].is_selected
        reference.values.data.copy_(trained[path].values.data)
