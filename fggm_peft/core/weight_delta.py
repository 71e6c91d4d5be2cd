"""Sparse deltas of one weight as sets and sums: unions, intersections, and any of them as elements.

Nothing here makes a delta dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import ELEMENTS, Granularity, Shape
from .index_codec import index_dtype


@dataclass(frozen=True)
class WeightDelta:
    """One task's change of one weight: a support and the trained values on it.

    Args:
        granularity: kind of unit.
        indices: ``[k]`` integers, sorted, unique.
        values: ``granularity.values_shape(shape, k)``.
        scale: the delta counts ``scale`` times.
    """

    granularity: Granularity
    indices: Tensor
    values: Tensor
    scale: float = 1.0


def as_elements(delta: WeightDelta, shape: Shape) -> WeightDelta:
    """The same delta with every entry of its units as an element of its own."""
    indices, order = delta.granularity.sorted_elements(delta.indices, shape)
    values = delta.values.reshape(-1) if order is None else delta.values.reshape(-1)[order]
    return WeightDelta(ELEMENTS, indices.to(index_dtype(shape[0] * shape[1])), values, delta.scale)


def in_one_granularity(deltas: Sequence[WeightDelta], shape: Shape) -> Sequence[WeightDelta]:
    """The same deltas: as they are if they have one granularity in common, else as elements."""
    if len({delta.granularity for delta in deltas}) > 1:
        return [as_elements(delta, shape) for delta in deltas]
    return deltas


def union(deltas: Sequence[WeightDelta]) -> Tensor:
    """The indices that any of the deltas has, sorted; all are of one granularity."""
    return torch.cat([delta.indices for delta in deltas]).unique(sorted=True)


def spread(values: Tensor, indices: Tensor, onto: Tensor, dim: int) -> Tensor:
    """Values of the units ``indices`` as values of all units ``onto``, zero where there are none.

    Args:
        indices, onto: sorted and unique; ``onto`` has all of ``indices``.
        dim: of the values, that counts units.
    """
    shape = list(values.shape)
    shape[dim] = len(onto)
    position = torch.searchsorted(onto, indices.to(onto.dtype))
    return values.new_zeros(shape).index_copy_(dim, position, values)


def united(deltas: Sequence[WeightDelta]) -> WeightDelta:
    """The sum of deltas of one granularity on the union of their supports, in float32 at least."""
    first = deltas[0]
    indices = union(deltas)
    dim, shape = first.granularity.unit_dim, list(first.values.shape)
    shape[dim] = len(indices)
    wide = torch.float32
    for delta in deltas:
        wide = torch.promote_types(wide, delta.values.dtype)
    values = torch.zeros(shape, dtype=wide, device=first.values.device)
    for delta in deltas:
        position = torch.searchsorted(indices, delta.indices)
        values.index_add_(dim, position, delta.values.detach().to(wide), alpha=delta.scale)
    return WeightDelta(first.granularity, indices, values)


def combined(deltas: Sequence[WeightDelta], shape: Shape) -> WeightDelta:
    """The sum of deltas of any granularities: theirs if they have one in common, else elements."""
    return united(in_one_granularity(deltas, shape))


def shared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``a`` and where in ``b`` the numbers stand that both hold; each is sorted and unique."""
    if not len(a) or not len(b):
        empty = torch.empty(0, dtype=torch.int64, device=a.device)
        return empty, empty
    position = torch.searchsorted(b.long(), a.long()).clamp_(max=len(b) - 1)
    both = b[position] == a
    return both.nonzero().squeeze(1), position[both]


def restricted(delta: WeightDelta, keep: Tensor) -> WeightDelta:
    """The delta on the units at the positions ``keep`` alone (int64, sorted)."""
    values = delta.values.index_select(delta.granularity.unit_dim, keep)
    return WeightDelta(delta.granularity, delta.indices[keep], values, delta.scale)


def unit_squares(delta: WeightDelta) -> Tensor:
    """The squared norm of each unit's values, ``[k]`` float32 at least."""
    wide = torch.promote_types(delta.values.dtype, torch.float32)
    squares = delta.values.detach().to(wide).square() * delta.scale**2
    other = [dim for dim in range(squares.dim()) if dim != delta.granularity.unit_dim]
    return squares.sum(other) if other else squares
