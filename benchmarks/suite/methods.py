"""The methods that are measured side by side, of equal size wherever they have one. A method is one entry.

An entry makes a model that is ready to train from a frozen base, and as many trainable values as are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

from fggm_peft import FGGMConfig
from fggm_peft.tuner.support import fggm_layers

from .bases import sharing_weights

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def targets(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS}


def shapes(model: nn.Module) -> list[tuple[int, int]]:
    """``(o, i)`` of every targeted weight, also of a quantized one."""
    return [(module.out_features, module.in_features) for module in targets(model).values()]


def targeted_values(model: nn.Module) -> int:
    return sum(o * i for o, i in shapes(model))


def fggm(base: nn.Module, values: int, granularity: str) -> nn.Module:
    """Units at random: which they are does not change what they cost."""
    density = values / targeted_values(base)
    config = FGGMConfig(target_modules=TARGETS, granularity=granularity, density=density, criterion="random")
    return get_peft_model(sharing_weights(base), config)


def low_rank(base: nn.Module, values: int, make: Callable[[int], PeftConfig]) -> nn.Module:
    """The rank whose number of trainable values is nearest to ``values``."""
    one, two = (trainable(get_peft_model(sharing_weights(base), make(rank))) for rank in (1, 2))
    rank = max(1, round((values - (2 * one - two)) / (two - one)))
    return get_peft_model(sharing_weights(base), make(rank))


def lora_config(rank: int, **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, **options)


def shira_config(rank: int) -> ShiraConfig:
    return ShiraConfig(r=rank, target_modules=TARGETS)


def osf(base: nn.Module, values: int) -> nn.Module:
    """The share of each weight's singular directions that leaves about ``values`` trainable."""
    all_directions = sum(min(shape) * (sum(shape) + 1) for shape in shapes(base))
    config = OSFConfig(target_modules=TARGETS, effective_rank=max(1e-3, 1 - values / all_directions))
    return get_peft_model(sharing_weights(base), config)


def full(base: nn.Module, values: int) -> nn.Module:
    """Every targeted weight trains, in memory of its own."""
    model = sharing_weights(base)
    for layer in targets(model).values():
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def masked(base: nn.Module, values: int) -> nn.Module:
    """The form in the paper: the full gradient of rows, with zeros where the mask has them."""
    model = full(base, values)
    density = values / targeted_values(base)
    for layer in targets(model).values():
        rows = layer.weight.shape[0]
        mask = torch.zeros(rows, 1, dtype=layer.weight.dtype, device=layer.weight.device)
        mask[: max(1, round(density * rows))] = 1
        layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


FROZEN = "frozen"
ROWS, COLUMNS, ELEMENTS = "FGGM rows", "FGGM columns", "FGGM elements"
FGGM = {ROWS: "row", COLUMNS: "column", ELEMENTS: "element"}

METHODS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    FROZEN: lambda base, values: sharing_weights(base),
    **{name: partial(fggm, granularity=granularity) for name, granularity in FGGM.items()},
    "LoRA": partial(low_rank, make=lora_config),
    "DoRA": partial(low_rank, make=partial(lora_config, use_dora=True)),
    "SHiRA": partial(low_rank, make=shira_config),
    "OSF": osf,
    "full": full,
    "full, masked": masked,
}

NEEDS_DENSE = ("SHiRA", "OSF", "full", "full, masked")
"""Methods that PEFT does not offer on a quantized base, or nobody has."""
NEEDS_TIME = ("OSF",)
"""A singular value decomposition of each weight before the first step: left out of large models."""
ADAPTERS = (*FGGM, "LoRA", "DoRA", "SHiRA", "OSF")
CANNOT_UNMERGE = ("OSF",)


def methods_for(base: str, parameters: int) -> list[str]:
    """The methods that a case takes: on a quantized base, or a large one, some cannot be had."""
    left_out = set(NEEDS_DENSE if base in ("int8", "nf4") else ())
    if base == "int8":  # DoRA copies a layer for its norms, and the copy takes the layer's scales with it
        left_out |= {"DoRA"}
    if parameters > 60e6:
        left_out |= set(NEEDS_TIME)
    if parameters > 300e6:
        left_out |= {"full", "full, masked"}  # each with optimizer state of its own, beside the others
    return [name for name in METHODS if name not in left_out]


def held_mib(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> float:
    """What a model and its optimizer hold between steps."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors |= {id(t): t for t in state.values() if isinstance(t, torch.Tensor)}
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values()) / 2**20


def randomize_(model: nn.Module) -> nn.Module:
    """Small random values in all that trains, so that nothing is zero by birth."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    return model


def spread(model: nn.Module) -> int:
    """How many units an FGGM adapter has chosen from."""
    layers = fggm_layers(model, "default").values()
    return sum(layer.granularity["default"].units(layer.weight_shape) for layer in layers)
