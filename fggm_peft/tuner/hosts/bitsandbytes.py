"""Keeps bitsandbytes 4-bit layers usable for training on a CPU.

In eval mode without gradients ``Linear4bit`` (0.50) repacks its weight for a CPU kernel. Afterwards
``dequantize_4bit`` returns garbage, the input gets no gradient, and ``state_dict`` and ``deepcopy`` are
wrong: evaluate-then-train does exactly that. tests/tuner/test_bitsandbytes.py walks the whole loop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def guard_four_bit_layers(model: nn.Module) -> int:
    """Undo a repacking that has happened and prevent it from now on, in every 4-bit layer of ``model``.

    All layers are guarded, not only the adapted ones: the gradient flows through the others too.

    Returns:
        How many layers had been repacked. Their scales had been rounded to bfloat16 by bitsandbytes.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # not imported, so no layer of it can be in the model
        return 0
    restored = 0
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if _is_repacked(module):
            _unpack_(module)
            restored += 1
    if restored:
        warnings.warn(
            f"{restored} 4-bit layers had been repacked for inference by bitsandbytes, which rounds their scales "
            "to bfloat16. They were unpacked; to start from the exact weights, wrap the model before evaluating it.",
            stacklevel=3,
        )
    return restored


@contextmanager
def four_bit_layers_as_they_are(model: nn.Module) -> Iterator[None]:
    """Within it, evaluating repacks no 4-bit layer of ``model``; those that are repacked already stay so."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    kind = () if bitsandbytes is None else bitsandbytes.nn.Linear4bit
    layers = [module for module in model.modules() if isinstance(module, kind) and not _is_repacked(module)]
    before = [getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers]
    try:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        yield
    finally:
        for layer, supported in zip(layers, before, strict=True):
            layer.support_avx512bf16_for_cpu = supported


def _is_repacked(module: nn.Module) -> bool:
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def _unpack_(module: nn.Module) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    weight = module.weight
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:  # the inverse of 0.50 leaves the scales transposed and in bfloat16
        state.absmax = state.absmax.mT.reshape(-1).to(torch.float32)
    weight.data, weight.quant_state = data, state
    module.quant_state = state


def recover_quantization_state(layer: nn.Module) -> None:
    """Do what ``Linear4bit.forward`` does first: FSDP2 gathers a weight that has lost its quantization state."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit):
        bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
