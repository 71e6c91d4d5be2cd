"""Granularities with arguments: blocks of consecutive rows or columns, and n of m consecutive elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .granularity import GRANULARITIES, Columns, Elements, Granularity, Rows
from .harm_decay import Decay


@dataclass(frozen=True)
class _Blocks(Granularity):
    """``size`` consecutive slices are one unit. All products are those of the slices of the selected blocks."""

    slices: ClassVar[Granularity]
    size: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise ValueError(f"{type(self).__name__}.size must be an integer > 0, got {self.size!r}")

    def _slices_of(self, indices: Tensor) -> Tensor:
        """The indices of all slices of the blocks, sorted."""
        return (indices[:, None] * self.size + torch.arange(self.size, device=indices.device)).flatten()

    def _flat(self, values: Tensor) -> Tensor:
        """Values of blocks as values of slices."""
        return values.flatten(self.unit_dim, self.unit_dim + 1)

    def _blocked(self, values: Tensor) -> Tensor:
        """Values of slices as values of blocks."""
        return values.unflatten(self.unit_dim, (-1, self.size))

    def supports(self, shape):
        return shape[self.unit_dim] % self.size == 0

    def units(self, shape):
        return shape[self.unit_dim] // self.size

    def parameters_per_unit(self, shape):
        return self.size * self.slices.parameters_per_unit(shape)

    def values_shape(self, shape, k):
        flat = self.slices.values_shape(shape, k)
        return (*flat[: self.unit_dim], k, self.size, *flat[self.unit_dim + 1 :])

    def element_indices(self, indices, shape):
        return self.slices.element_indices(self._slices_of(indices.long()), shape)

    def reduce(self, matrix):
        return self.slices.reduce(matrix).unflatten(0, (-1, self.size)).sum(1)

    def accumulate_(self, scores, gradients, half):
        of_slices = scores.new_zeros(len(scores), self.size * scores.shape[1])
        self.slices.accumulate_(of_slices, gradients, half)
        scores += of_slices.unflatten(1, (-1, self.size)).sum(2)

    def sorted_elements(self, indices, shape):
        return self.element_indices(indices, shape), None

    def gather(self, weight, indices):
        return self._blocked(self.slices.gather(weight, self._slices_of(indices)))

    def put_(self, weight, indices, entries):
        self.slices.put_(weight, self._slices_of(indices), self._flat(entries))

    def stored_input(self, x, indices):
        return self.slices.stored_input(x, self._slices_of(indices))

    def value_gradient(self, stored, g, indices):
        return self._blocked(self.slices.value_gradient(stored, g, self._slices_of(indices)))

    def add_product_(self, y, x, indices, values, scale=1.0):
        self.slices.add_product_(y, x, self._slices_of(indices), self._flat(values), scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        self.slices.add_input_gradient_(gx, g, self._slices_of(indices), self._flat(values), scale)

    def decay(self, covariance, indices, shape):
        return _BlockDecay(self, self.slices.decay(covariance, self._slices_of(indices), shape))


@dataclass(frozen=True, eq=False)
class _BlockDecay(Decay):
    """Harm decay of the slices of the blocks."""

    blocks: _Blocks
    of_slices: Decay

    def shrunk(self, values, sigma):
        return self.blocks._blocked(self.of_slices.shrunk(self.blocks._flat(values), sigma))

    def harm(self, values):
        return self.of_slices.harm(self.blocks._flat(values))


@GRANULARITIES.register("row_block")
@dataclass(frozen=True)
class RowBlocks(_Blocks):
    """``size`` consecutive rows, such as the query rows of an attention head. Values are ``[k, size, i]``."""

    slices = Rows()


@GRANULARITIES.register("column_block")
@dataclass(frozen=True)
class ColumnBlocks(_Blocks):
    """``size`` consecutive columns, such as the output projection of a head. Values are ``[o, k, size]``."""

    unit_dim = 1
    stores_partial_input = True
    slices = Columns()


@GRANULARITIES.register("n_of_m")
@dataclass(frozen=True)
class NofM(Elements):
    """Single entries, at most ``n`` of each ``m`` consecutive entries of a row, such as 2:4. Values are ``[k]``.

    ``density=n/m`` selects exactly the ``n`` best of each ``m``. A lower density selects fewer.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if any(type(value) is not int for value in (self.n, self.m)) or not 0 < self.n < self.m:
            raise ValueError(f"NofM requires integers 0 < n < m, got n={self.n!r} and m={self.m!r}")

    def supports(self, shape):
        return shape[1] % self.m == 0

    def most_units(self, shape):
        return self.units(shape) // self.m * self.n

    def selectable(self, scores):
        groups = scores.view(-1, self.m)
        best = groups.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        return torch.zeros_like(groups).scatter(1, best, groups.gather(1, best)).flatten()
