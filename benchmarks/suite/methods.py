"""The measured methods, with equally many trainable values if their number can be chosen. A method is one entry.

An entry takes a frozen base and a number of trainable values, and returns a model that is ready to train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from common import DEVICE
from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

from fggm_peft import FGGMConfig
from fggm_peft.tuner import find_targets

from .bases import sharing_weights

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def targets(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS}


def shapes(model: nn.Module) -> list[tuple[int, int]]:
    """``(o, i)`` of every targeted weight; quantized weights included."""
    return [(module.out_features, module.in_features) for module in targets(model).values()]


def targeted_values(model: nn.Module) -> int:
    return sum(o * i for o, i in shapes(model))


def random_indices(total: int, count: int, device: torch.device) -> torch.Tensor:
    """Different numbers below ``total``, sorted, drawn on the device: for a billion entries a CPU takes a minute."""
    return torch.randperm(total, device=device)[:count].sort().values


def fggm(base: nn.Module, values: int, granularity: str) -> nn.Module:
    """FGGM with random units: their positions do not change the cost."""
    density = values / targeted_values(base)
    config = FGGMConfig(target_modules=TARGETS, granularity=granularity, density=density)
    model = get_peft_model(sharing_weights(base), config)
    for target in find_targets(model, "default").values():
        count = max(1, round(density * target.units))
        target.layer.set_support("default", random_indices(target.units, count, DEVICE))
    return model


def low_rank(base: nn.Module, values: int, make: Callable[[int], PeftConfig]) -> nn.Module:
    """A low-rank method with the rank whose number of trainable values is nearest to ``values``."""
    one, two = (trainable(get_peft_model(sharing_weights(base), make(rank))) for rank in (1, 2))
    rank = max(1, round((values - (2 * one - two)) / (two - one)))
    return get_peft_model(sharing_weights(base), make(rank))


def lora_config(rank: int, **options) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, **options)


def shira_config(rank: int) -> ShiraConfig:
    config = ShiraConfig(r=rank, target_modules=TARGETS)
    config.mask_fn = shira_mask
    return config


def shira_mask(base_layer: nn.Module, r: int, **kwargs) -> torch.Tensor:
    weight = base_layer.weight
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[random_indices(len(mask), r * sum(weight.shape), weight.device)] = True
    return mask.view(weight.shape)


def osf(base: nn.Module, values: int) -> nn.Module:
    """OSF with the share of singular directions that leaves about ``values`` trainable."""
    all_directions = sum(min(shape) * (sum(shape) + 1) for shape in shapes(base))
    config = OSFConfig(target_modules=TARGETS, effective_rank=max(1e-3, 1 - values / all_directions))
    return get_peft_model(sharing_weights(base), config)


def full(base: nn.Module, values: int) -> nn.Module:
    """Full fine-tuning of every targeted weight, on copies of the weights."""
    model = sharing_weights(base)
    for layer in targets(model).values():
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def masked(base: nn.Module, values: int) -> nn.Module:
    """The form in the paper: full fine-tuning with a mask on the gradients of rows."""
    model = full(base, values)
    density = values / targeted_values(base)
    for layer in targets(model).values():
        rows = layer.weight.shape[0]
        mask = torch.zeros(rows, 1, dtype=layer.weight.dtype, device=layer.weight.device)
        mask[: max(1, round(density * rows))] = 1
        layer.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


FROZEN = "frozen"
WEIGHT_GRADIENTS = "gradients of all weights"
CONTIGUOUS = "contiguous values"
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
"""Methods that do not support a quantized base."""
NEEDS_TIME = ("OSF",)
"""Methods that compute a singular value decomposition of each weight; not measured on large models."""
ADAPTERS = (*FGGM, "LoRA", "DoRA", "SHiRA", "OSF")
CANNOT_UNMERGE = ("OSF",)


def methods_for(base: str, parameters: int) -> list[str]:
    """The methods that a case measures; some do not support quantized or large bases."""
    left_out = set(NEEDS_DENSE if base in ("int8", "nf4") else ())
    if base == "int8":  # DoRA copies a layer for its norms, which removes the scales of the layer
        left_out |= {"DoRA"}
    if parameters > 60e6:
        left_out |= set(NEEDS_TIME)
    if parameters > 300e6 and DEVICE.type == "cpu":
        left_out |= {"full", "full, masked"}  # together they do not fit into memory
    return [name for name in METHODS if name not in left_out]


def held_mib(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> float:
    """Memory of a model and its optimizer between steps."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for state in optimizer.state.values() if optimizer is not None else ():
        tensors |= {id(t): t for t in state.values() if isinstance(t, torch.Tensor)}
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values()) / 2**20


def randomize_(model: nn.Module) -> nn.Module:
    """Fill trainable parameters with small random values, because some start at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    return model


def spread(model: nn.Module) -> int:
    """The number of units of the weights that an FGGM adapter targets."""
    return sum(target.units for target in find_targets(model, "default").values())
