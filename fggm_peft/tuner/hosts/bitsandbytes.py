"""Workarounds for bitsandbytes 4-bit layers on a CPU.

In eval mode without gradients, ``Linear4bit`` (0.50) repacks its weight for a CPU kernel. Afterwards
``dequantize_4bit`` returns garbage, the input gets no gradient, and ``state_dict`` and ``deepcopy`` are wrong.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn


def guard_four_bit_layers(model: nn.Module) -> None:
    """Unpack the repacked 4-bit layers of a model, and prevent repacking in all."""
    layers = _four_bit_layers(model)
    repacked = [layer for layer in layers if _is_repacked(layer)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    for layer in repacked:
        _unpack_(layer)
    if repacked:
        warnings.warn(
            f"bitsandbytes had repacked {len(repacked)} 4-bit layers for inference, which rounds their scales to "
            "bfloat16. They were unpacked. To start from the exact weights, wrap the model before evaluating it.",
            stacklevel=3,
        )


def _four_bit_layers(model: nn.Module) -> list[Any]:
    bitsandbytes = sys.modules.get("bitsandbytes")
    kind = () if bitsandbytes is None else bitsandbytes.nn.Linear4bit
    return [module for module in model.modules() if isinstance(module, kind)]


def _is_repacked(module: nn.Module) -> bool:
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpack_(module: nn.Module) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = module.weight
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:  # the inverse in 0.50 leaves the scales transposed and in bfloat16
        state.absmax = state.absmax.mT.reshape(-1).to(torch.float32)
    weight.data, weight.quant_state = data, state
    module.quant_state = state


def recover_quantization_state(layer: nn.Module) -> None:
    """Restore the quantization state of a weight that FSDP2 has gathered, as ``Linear4bit.forward`` does."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit):
        bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
