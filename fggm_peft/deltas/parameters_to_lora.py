"""The LoRA tensors of deltas of parameters (experts and routers), as PEFT stores them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.files.tensors import PREFIX
from ..tuner.layer import FGGMLayer

Factors = tuple[Tensor, Tensor]
"""``A`` ``[rank, i]`` and ``B`` ``[o, rank]``."""


@dataclass
class ParameterExport:
    """The factors of the parameters of one module.

    Args:
        path: the module's path.
        module: the module.
        factors: name of a parameter -> index of an expert (0 if it is one matrix) -> its factors.
    """

    path: str
    module: nn.Module
    factors: dict[str, dict[int, Factors]] = field(default_factory=dict)

    @classmethod
    def add_(cls, exports: dict[str, ParameterExport], path: str, layer: FGGMLayer, factors: Factors) -> None:
        """Add the factors of one matrix to those of its module."""
        base: Any = layer.get_base_layer()
        if isinstance(base, nn.Module):
            module, name, index = base, "weight", None
        else:
            module, name, index = base.module, base.name, base.index
            path = path.rsplit(".", 1 if index is None else 2)[0]
            if layer.is_transposed != (index is not None and getattr(module, "is_transposed", False)):
                factors = factors[1].mT, factors[0].mT  # PEFT takes what is stored as [o, i]
        export = exports.setdefault(path, cls(path, module))
        export.factors.setdefault(name, {})[index or 0] = factors

    def ranks(self) -> dict[str, int]:
        """PEFT's key of each parameter -> rank."""
        return {f"{self.path}.{n}": max(len(a) for a, _ in group.values()) for n, group in self.factors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by PEFT's keys."""
        # PEFT wraps the module once for each parameter, innermost for the first one
        names = [name for name, _ in self.module.named_parameters(recurse=False) if name in self.factors]
        tensors: dict[str, Tensor] = {}
        for depth, name in enumerate(reversed(names)):
            a, b = self._stacked(name, self.ranks()[f"{self.path}.{name}"])
            prefix = PREFIX + self.path + ".base_layer" * depth
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        return tensors

    def _stacked(self, name: str, rank: int) -> Factors:
        """The factors of all matrices of a parameter, with zeros for those that do not change."""
        shape = self.module.get_parameter(name).shape
        experts, (o, i) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        if len(shape) == 3 and getattr(self.module, "is_transposed", False):
            o, i = i, o
        a, b = torch.zeros(experts, rank, i), torch.zeros(experts, o, rank)
        for index, (left, right) in self.factors[name].items():
            a[index, : len(left)], b[index, :, : right.shape[1]] = left, right
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
