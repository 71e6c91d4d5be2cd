"""What ranks the units of a weight. A criterion is one short function over collected quantities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .granularity import Granularity, Shape
from .registry import Registry


@dataclass(frozen=True)
class Quantities:
    """What a criterion may look at, for one weight.

    Args:
        granularity: kind of unit.
        shape: ``(o, i)``.
        weight: gives the base weight ``[o, i]``, dequantized if need be.
        generator: seeded for this weight, on the CPU.
        fisher: diagonal Fisher information of the units, ``[units]`` float32 (FGGM equation 3):
            the mean over samples of squared gradients. None where the criterion needs no data.
    """

    granularity: Granularity
    shape: Shape
    weight: Callable[[], Tensor]
    generator: torch.Generator
    fisher: Tensor | None = None


@dataclass(frozen=True)
class Criterion:
    """A named way to score units.

    Args:
        score: quantities -> ``[units]``, finite and not negative; the highest scores may move.
        needs_data: whether it looks at ``fisher``; the adapter is then born empty.
    """

    score: Callable[[Quantities], Tensor]
    needs_data: bool


CRITERIA: Registry[Criterion] = Registry("criterion")


def _fisher(quantities: Quantities) -> Tensor:
    assert quantities.fisher is not None
    return quantities.fisher


def _random(quantities: Quantities) -> Tensor:
    count = quantities.granularity.units(quantities.shape)
    # (0, 1], because a score of 0 is never chosen
    return 1 - torch.rand(count, generator=quantities.generator)


def _weight_magnitude(quantities: Quantities) -> Tensor:
    return quantities.granularity.reduce(quantities.weight().abs().float())


CRITERIA.register("fisher", Criterion(_fisher, needs_data=True))
CRITERIA.register("random", Criterion(_random, needs_data=False))
CRITERIA.register("weight_magnitude", Criterion(_weight_magnitude, needs_data=False))
