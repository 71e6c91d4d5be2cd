"""Statistics that a pass over data collects for one weight. A criterion names the statistics that it uses.

Each statistic has two running sums, one for the even and one for the odd samples, so that a selection can estimate
whether other data would have selected the same units. Sums add up over batches and over processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .granularity import Granularity, Shape
from .per_sample import PerSampleGradients
from .registry import Registry


class Features(NamedTuple):
    """The input of one call of a layer."""

    values: Tensor  # [b, t, i]
    real: Tensor | None  # [b, t] False where a position is padding


class Statistic(ABC):
    """One quantity, with a running sum of ``size`` numbers for each half of the samples.

    Attributes:
        looks_at: "gradient" requires a backward pass; "input" (of the layer) does not.
        is_kept: it is stored with a task and can be the reference of later tasks; it is not negative then.
    """

    looks_at: ClassVar[Literal["gradient", "input"]] = "gradient"
    is_kept: ClassVar[bool] = True

    @abstractmethod
    def size(self, granularity: Granularity, shape: Shape) -> int:
        """Length of one running sum."""

    @abstractmethod
    def add_(self, sums: Tensor, granularity: Granularity, seen: PerSampleGradients | Features, half: Tensor) -> None:
        """Add one batch to ``sums[half]``; ``sums`` is ``[2, size]`` float32, ``half`` ``[b]`` on the CPU is 0 or 1."""

    def mean(self, total: Tensor, count: int) -> Tensor:
        """The statistic itself, from a running sum ``[size]`` over ``count`` samples."""
        return total / count

    def entries(self, granularity: Granularity, shape: Shape) -> int:
        """The number of weight entries that each number is the sum over."""
        return granularity.parameters_per_unit(shape)


STATISTICS: Registry[Statistic] = Registry("statistic", make=lambda statistic: statistic())


@STATISTICS.register("fisher")
class Fisher(Statistic):
    """Squared per-sample gradients of the units, ``[units]``: the diagonal Fisher information (FGGM equation 3)."""

    def size(self, granularity, shape):
        return granularity.units(shape)

    def add_(self, sums, granularity, seen, half):
        granularity.accumulate_(sums, seen, half)


@STATISTICS.register("fisher_under_decay")
class FisherUnderDecay(Fisher):
    """``fisher`` for inputs that the pass has mapped by an ``InputMetric``; its criterion divides it."""

    is_kept = False


@STATISTICS.register("input_second_moment")
class InputSecondMoment(Statistic):
    """``E x^2`` of each input feature, ``[i]``: the mean over positions; padding does not count.

    It requires a forward pass only. The last number of each running sum counts positions, because layers differ in it.
    """

    looks_at = "input"

    def size(self, granularity, shape):
        return shape[1] + 1

    def add_(self, sums, granularity, seen, half):
        values, positions = seen.values.float().square(), seen.values.new_ones(seen.values.shape[:2]).float()
        if seen.real is not None:
            values, positions = values.where(seen.real[..., None], 0), seen.real.float()
        half = half.to(sums.device)
        sums[:, :-1].index_add_(0, half, values.sum(1))
        sums[:, -1].index_add_(0, half, positions.sum(1))

    def mean(self, total, count):
        return total[:-1] / total[-1].clamp(min=1)

    def entries(self, granularity, shape):
        return 1


def ones(name: str, granularity: Granularity, shape: Shape) -> Tensor:
    """The statistic, in the form that criteria receive, with every number 1."""
    statistic = STATISTICS[name]
    return statistic.mean(torch.ones(statistic.size(granularity, shape)), 1)
