"""Base models of the suite: random Llamas, dense or quantized by bitsandbytes, and copies that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from common import DEVICE, llama
from torch import nn


def dense(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
    return lambda model: model.to(DEVICE, dtype)


def eight_bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)


def four_bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    options = {"quant_type": "nf4", "compress_statistics": True, "compute_dtype": torch.bfloat16}
    return bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, **options)


def quantized(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Replace every linear layer except the head by a layer of ``make``; the rest is bfloat16, as in QLoRA."""

    def convert(model: nn.Module) -> nn.Module:
        model = model.to(DEVICE, torch.bfloat16)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                layer = make(module)
                layer.load_state_dict(module.state_dict())
                parent, _, child = name.rpartition(".")
                # the layer's own to() also moves the quantization state
                setattr(model.get_submodule(parent), child, layer.to(DEVICE))
        return model

    return convert


BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": dense(torch.float32),
    "bfloat16": dense(torch.bfloat16),
    "int8": quantized(eight_bit),
    "nf4": quantized(four_bit),
}


def make_base(hidden: int, layers: int, vocabulary: int, kind: str) -> nn.Module:
    return BASES[kind](llama(hidden, layers, vocab=vocabulary)).requires_grad_(False)


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters of ``model``, so that many methods fit into memory together."""
    shared: list[object] = list(model.parameters())
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):  # its first forward removes the scales from the shared weight
            if module.weight.CB is not None:
                module.init_8bit_state()
            shared += [module.state.CB, module.state.SCB]
    return copy.deepcopy(model, {id(each): each for each in shared})
