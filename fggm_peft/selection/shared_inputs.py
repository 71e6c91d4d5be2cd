"""What consecutive layers with the same input share within a batch, such as the query, key and value projections.

Only the results of the last input are stored. The memory of an input identifies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.harm_decay import InputMetric
from ..core.per_sample import GramMatrix, same_memory


class SharedInputs:
    """Results that belong to the last input, for one batch.

    Args:
        padding: ``[b, t]`` True where a position is padding, or None.
    """

    def __init__(self, padding: Tensor | None):
        self.padding = padding
        self._gram: tuple[Tensor, GramMatrix] | None = None
        self._cleaned: tuple[Tensor, Tensor] | None = None

    def gram(self, x: Tensor) -> GramMatrix:
        """The Gram matrix of an input ``[b, t, i]``. It is computed when a layer needs it."""
        if self._gram is None or not same_memory(self._gram[0], x):
            self._gram = x, GramMatrix(shared_by=0)
        self._gram[1].shared_by += 1
        return self._gram[1]

    def cleaned_input(self, x: Tensor, metric: InputMetric | None = None) -> Tensor:
        """``cleaned``, and mapped by the metric; computed once for layers with the same input."""
        if self._cleaned is None or not same_memory(self._cleaned[0], x):
            cleaned = self.cleaned(x)
            self._cleaned = x, cleaned if metric is None else metric(cleaned)
        return self._cleaned[1]

    def cleaned(self, tensor: Tensor) -> Tensor:
        """The tensor without the NaN that eager attention leaves at padded positions on the left."""
        padding = self.padding
        if padding is None or tensor.shape[:2] != padding.shape or not tensor.is_floating_point():
            return tensor
        padded = padding.to(tensor.device).view(*padding.shape, *[1] * (tensor.dim() - 2))
        return torch.where(padded, tensor.nan_to_num(0.0, 0.0, 0.0), tensor)


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written into; None for inference tensors, which have no counter."""
    return None if tensor.is_inference() else tensor._version
