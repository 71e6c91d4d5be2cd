"""Context managers that run a pass over a model and restore the model afterwards, also after an error."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..tuner.target import Targets


@contextmanager
def frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Freeze the model and put it into eval mode.

    Restores training modes, ``requires_grad``, gradients, ``config.use_cache``, and the random number generators of
    torch (every device), numpy and Python.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with same_random_state(), _in_eval_mode(model), torch.enable_grad():
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)


@contextmanager
def without_delta(targets: Targets) -> Iterator[None]:
    """Switch the adapter's own delta off: statistics are taken where training starts."""
    scales = [(target, target.scale) for target in targets.values()]
    for target, _ in scales:
        target.layer.scaling[target.adapter_name] = 0.0
    try:
        yield
    finally:
        for target, scale in scales:
            target.layer.scaling[target.adapter_name] = scale


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restore the random number generators of torch (every device), numpy and Python."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode in which gradient checkpointing still works.

    transformers checkpoints only in training mode, so modules that checkpoint get ``training=True``. Their own dropout
    rates are 0 meanwhile, and their children are in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    rates: list[tuple[nn.Module, str, float]] = []
    try:
        model.eval()
        for module, _ in modes:
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
                rates += [(module, k, v) for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        if use_cache is not None:
            config.use_cache = use_cache
        for module, training in modes:
            module.training = training
