"""The overlap of two deltas: the Jaccard index of their supports, and the cosine of their values on shared entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..core.weight_delta import in_one_granularity, shared
from .delta import ModuleDelta, SparseDelta


@dataclass(frozen=True)
class Shared:
    """The overlap of two deltas in some weights, as sums that add up over weights.

    Args:
        both: number of entries in both supports.
        expected: number of entries that random supports of the same sizes share on average.
        total: entries of the first support plus entries of the second.
        product: inner product of the values on the shared entries.
        square_a, square_b: squared norms of the values on the shared entries.
    """

    both: int = 0
    expected: float = 0.0
    total: int = 0
    product: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    def __add__(self, other: Shared) -> Shared:
        return Shared(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def jaccard(self) -> float:
        """``|A and B| / |A or B|`` in entries; 0 if both are empty."""
        return self.both / (self.total - self.both) if self.total else 0.0

    @property
    def chance(self) -> float:
        """The Jaccard index of random supports: ``e / (|A| + |B| - e)`` with ``e`` the expected shared entries."""
        return self.expected / (self.total - self.expected) if self.total else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine of the values on the shared entries; None if there are none, or one delta is zero there."""
        norm = (self.square_a * self.square_b) ** 0.5
        return self.product / norm if norm else None

    def to_dict(self) -> dict[str, Any]:
        return {"jaccard": self.jaccard, "chance": self.chance, "cosine": self.cosine, "shared_entries": self.both}


@dataclass(frozen=True)
class Overlap:
    """The overlap of two deltas by module path, and in ``total``."""

    modules: dict[str, Shared]

    @cached_property
    def total(self) -> Shared:
        return sum(self.modules.values(), Shared())

    def __str__(self) -> str:
        return f"Jaccard {self.total.jaccard:.3f}, by chance {self.total.chance:.3f}"


def overlap(first: Any, second: Any) -> Overlap:
    """Compare the supports and values of two deltas.

    Args:
        first, second: what ``SparseDelta.read`` accepts.

    Raises:
        ValueError: the deltas were made for different bases.
    """
    a, b = SparseDelta.read(first), SparseDelta.read(second)
    a.require_same_base(b)
    return Overlap({path: _compare(a.modules.get(path), b.modules.get(path)) for path in a.modules | b.modules})


def _compare(a: ModuleDelta | None, b: ModuleDelta | None) -> Shared:
    total = sum(module.values.numel() for module in (a, b) if module is not None)
    if a is None or b is None:
        return Shared(total=total)
    supports = in_one_granularity([a, b], a.shape)
    positions = shared(supports[0].indices, supports[1].indices)
    x, y = (d.restricted(at).values.double().reshape(-1) for d, at in zip(supports, positions, strict=True))
    expected = a.values.numel() * b.values.numel() / (a.shape[0] * a.shape[1])
    return Shared(len(x), expected, total, float(x @ y), float(x @ x), float(y @ y))
