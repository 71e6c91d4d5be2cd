"""Observes what a module multiplies by its own parameters, such as the tokens that are routed to each expert."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..tuner.parameters import ParameterLayer

_CASTS = {Tensor.to, Tensor.type, Tensor.float}
_PRODUCTS = {nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm}


class WeightInputs(TorchFunctionMode):
    """Calls ``record(path, x)`` for each product of an ``x`` ``[n, i]`` and a parameter of a module.

    A parameter, or one expert's part of it, is recognized by its memory, so the module's code need not be known. In
    transformers' "eager" implementation, which is used meanwhile, each product has the tokens of one expert. An expert
    of a batched product has a row of zeros for each token that is not routed to it; these rows are left out.
    """

    def __init__(self, module: nn.Module, record: Callable[[str, Tensor], None]):
        super().__init__()
        self.module, self.record = module, record
        self.paths: dict[str, dict[int, str]] = defaultdict(dict)  # parameter -> expert -> path
        self._unseen: set[str] = set()
        self._cast: dict[str, Tensor] = {}  # routers may multiply by a float32 copy
        config: Any = getattr(module, "config", None)
        self._config = config if hasattr(config, "_experts_implementation") else None
        self._implementation: Any = None

    def add(self, path: str, layer: ParameterLayer) -> None:
        """Observe one weight of the module."""
        _, name, expert = layer.source
        self.paths[name][expert or 0] = path

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Observe the module's calls until the handles are removed."""
        return [
            self.module.register_forward_pre_hook(self._start),
            self.module.register_forward_hook(self._end, always_call=True),
        ]

    def _start(self, module: nn.Module, args: tuple) -> None:
        if self._config is not None:
            self._implementation, self._config._experts_implementation = self._config._experts_implementation, "eager"
        self._unseen, self._cast = set(self.paths), {}
        self.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.__exit__(None, None, None)
        if self._config is not None:
            self._config._experts_implementation = self._implementation
        if output is not None and self._unseen:
            path = next(iter(self.paths[min(self._unseen)].values()))
            raise ValueError(
                f"{path}: {type(module).__name__} does not multiply its input by this parameter in a way that can be "
                "observed, so harm decay does not support it. Leave it out, or set harm_decay=0"
            )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and len(args) > 1:
            for name, paths in self.paths.items():
                self._observe(name, paths, args[0].detach(), args[1])
        output = func(*args, **(kwargs or {}))
        if func in _CASTS:
            self._cast |= {name: output for name in self.paths if args[0] is getattr(self.module, name)}
        return output

    def _observe(self, name: str, paths: dict[int, str], x: Tensor, weight: Tensor) -> None:
        parameter = self._cast.get(name, getattr(self.module, name))  # in functional_call, the adapted copy
        offset = (weight.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        if not 0 <= offset < parameter.numel():
            return
        self._unseen.discard(name)
        if weight.dim() == 3:
            for expert, path in paths.items():
                self.record(path, x[expert][x[expert].any(1)])
            return
        expert = offset // parameter.stride(0) if parameter.dim() == 3 else 0
        if expert in paths:
            self.record(paths[expert], x.reshape(-1, x.shape[-1]))
