"""Small models quantized by torchao and HQQ on the CPU, in the form that transformers produces."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

TORCHAO = ("int8", "int8 with int8 inputs", "float8", "int4", "int4 with int8 inputs")
HQQ = ("hqq 8 bits", "hqq 4 bits", "hqq 2 bits")
QUANTIZATIONS = TORCHAO + HQQ


def _torchao_config(kind: str):
    torchao = pytest.importorskip("torchao.quantization")
    configs: dict[str, Callable] = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8 with int8 inputs": torchao.Int8DynamicActivationInt8WeightConfig,
        "float8": torchao.Float8WeightOnlyConfig,
        "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int4 with int8 inputs": lambda: torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    }
    return configs[kind]()


def _with_torchao(model: nn.Module, names: list[str], kind: str) -> None:
    quantization = _torchao_config(kind)
    from torchao import quantize_

    quantize_(model, quantization, filter_fn=lambda module, name: name in names)
    # PEFT reads this attribute of transformers' quantizer
    model.hf_quantizer = SimpleNamespace(quantization_config=_Configuration(quantization))


class _Configuration:
    def __init__(self, quantization: object):
        self.quantization = quantization

    def get_apply_tensor_subclass(self) -> object:
        return self.quantization


def _with_hqq(model: nn.Module, names: list[str], kind: str) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    for name in names:
        layer = model.get_submodule(name)
        settings = hqq.BaseQuantizeConfig(nbits=int(kind.split()[1]), group_size=16)
        parent, _, child = name.rpartition(".")
        new = hqq.HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device="cpu")
        setattr(model.get_submodule(parent), child, new)


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Quantize every linear layer except the head, in place."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    (_with_torchao if kind in TORCHAO else _with_hqq)(model, names, kind)
    return model.eval()
