"""Sparse deltas of one weight: sums, unions and intersections. No function here makes a delta dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import ELEMENTS, Granularity, Shape
from .index_codec import index_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class WeightDelta:
    """The change of one weight by one task: a support and the values on it.

    Args:
        granularity: kind of unit.
        indices: ``[k]`` integers, sorted, unique.
        values: ``granularity.values_shape(shape, k)``.
        scale: factor of the values.
    """

    granularity: Granularity
    indices: Tensor
    values: Tensor
    scale: float = 1.0

    def as_elements(self, shape: Shape) -> WeightDelta:
        """The same delta with every entry of its units as an element."""
        indices, values = self.granularity.as_elements(self.indices, self.values, shape)
        return WeightDelta(ELEMENTS, indices.to(index_dtype(shape[0] * shape[1])), values, self.scale)

    def restricted(self, keep: Tensor) -> Self:
        """The delta on the units at the positions ``keep`` only (int64, sorted)."""
        values = self.values.index_select(self.granularity.unit_dim, keep)
        return replace(self, indices=self.indices[keep], values=values)

    def unit_squares(self) -> Tensor:
        """The squared norm of each unit's values, ``[k]`` float32 at least."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        squares = self.values.detach().to(wide).square() * self.scale**2
        return squares.movedim(self.granularity.unit_dim, 0).unsqueeze(-1).flatten(1).sum(1)


def in_one_granularity(deltas: Sequence[WeightDelta], shape: Shape) -> Sequence[WeightDelta]:
    """The deltas themselves if they have the same granularity, otherwise as elements."""
    if len({delta.granularity for delta in deltas}) > 1:
        return [delta.as_elements(shape) for delta in deltas]
    return deltas


def union(deltas: Sequence[WeightDelta]) -> Tensor:
    """The sorted union of the indices of deltas of one granularity."""
    return torch.cat([delta.indices for delta in deltas]).unique(sorted=True)


def spread(values: Tensor, indices: Tensor, onto: Tensor, dim: int) -> Tensor:
    """Values of the units ``indices`` as values of the units ``onto``, which contain them, with zeros for the others.

    ``dim`` is the dimension of the values that counts units.
    """
    shape = list(values.shape)
    shape[dim] = len(onto)
    position = torch.searchsorted(onto, indices.to(onto.dtype))
    return values.new_zeros(shape).index_copy_(dim, position, values)


def united(deltas: Sequence[WeightDelta]) -> WeightDelta:
    """The sum of deltas of one granularity on the union of their supports, in float32 at least."""
    granularity, indices = deltas[0].granularity, union(deltas)
    dim, shape, wide = granularity.unit_dim, list(deltas[0].values.shape), torch.float32
    shape[dim] = len(indices)
    for delta in deltas:
        wide = torch.promote_types(wide, delta.values.dtype)
    values = torch.zeros(shape, dtype=wide, device=deltas[0].values.device)
    for delta in deltas:
        position = torch.searchsorted(indices, delta.indices)
        values.index_add_(dim, position, delta.values.detach().to(wide), alpha=delta.scale)
    return WeightDelta(granularity, indices, values)


def shared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The positions in ``a`` and in ``b`` of the numbers that both contain; each is sorted and unique."""
    if not len(a) or not len(b):
        empty = torch.empty(0, dtype=torch.int64, device=a.device)
        return empty, empty
    position = torch.searchsorted(b.long(), a.long()).clamp_(max=len(b) - 1)
    both = b[position] == a
    return both.nonzero().squeeze(1), position[both]
