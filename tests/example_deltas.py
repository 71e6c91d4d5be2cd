"""Adapters with random deltas, in memory and on disk, and their dense float64 equivalents."""

from __future__ import annotations

from pathlib import Path

import torch
from models import adapted, llama
from reference import KINDS, dense_delta, seeded
from torch import Tensor, nn

from fggm_peft.deltas import SparseDelta

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(granularity: str = "row", seed: int = 0, base: nn.Module | None = None, std: float = 0.05, **config):
    """A model with a random support and random values; the base weights do not depend on the seed."""
    base = llama() if base is None else base
    settings = {"criterion": "random", "density": 0.2, "seed": seed, "target_modules": TARGETS, **config}
    task = "CAUSAL_LM" if hasattr(base, "lm_head") else None
    model = adapted(base, granularity, task_type=task, **settings)
    generator = seeded(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fggm_values" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def saved_adapter(folder: Path, granularity: str = "row", seed: int = 0, **config) -> Path:
    adapter(granularity, seed, **config).save_pretrained(folder)
    return folder


def dense(delta: SparseDelta) -> dict[str, Tensor]:
    """Module path -> ``[o, i]`` float64, computed by the reference implementation."""
    return {
        name: dense_delta(module.granularity.name, module.shape, module.indices, module.values)
        for name, module in delta.modules.items()
    }


def mask_of(delta: SparseDelta, name: str) -> Tensor:
    """``[o, i]``, True on the support."""
    if name not in delta.modules:
        return torch.zeros(next(iter(delta.modules.values())).shape, dtype=torch.bool)
    module = delta.modules[name]
    ones = torch.ones_like(module.values)
    return dense_delta(module.granularity.name, module.shape, module.indices, ones) != 0


ALL = KINDS
PAIRS = [(a, b) for a in ALL for b in ALL]
