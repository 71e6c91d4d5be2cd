"""Runs a pass over a model and leaves no trace of it, also when the pass raises."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within it the model is frozen and in eval mode; after it all is as it was.

    Restored are: training modes, ``requires_grad``, gradients, ``config.use_cache``, and the random
    number generators of torch (every device), numpy and Python.
    """
    with ExitStack() as stack:
        stack.enter_context(same_random_state())
        stack.enter_context(_frozen(model))
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def same_random_state() -> Iterator[None]:
    """Within it torch (every device), numpy and Python may draw; after it all will draw as if they had not."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, in which modules that checkpoint their gradients still do so.

    transformers checkpoints in training mode only. Such modules get that flag, whatever mode the model was in (a
    trainer leaves it in eval mode until its first step); the dropout rates that they apply themselves are set to
    zero meanwhile, and their children are in eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    rates: list[tuple[nn.Module, str, float]] = []
    try:
        model.eval()
        for module, _ in modes:
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
                for name, value in list(vars(module).items()):
                    if "drop" in name and isinstance(value, float):
                        rates.append((module, name, value))
                        setattr(module, name, 0.0)
        if config is not None and use_cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        if config is not None and use_cache is not None:
            config.use_cache = use_cache
        for module, training in modes:
            module.training = training
