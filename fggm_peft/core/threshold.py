"""Threshold policies: scores of units -> which units may move.

A policy is a frozen dataclass that goes to JSON and back. ``scope="layer"`` looks at one weight at a
time, ``scope="global"`` at all of them together, ranked by score per trained parameter.

Three promises hold for every policy: exactly the promised number of units is chosen, ties go to the
lower index, and a unit whose score is 0 is never chosen (a dead row would become trainable through
the order of ties). At most so many units of one weight move if the caller says so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .ranking import above, best_per_parameter, checked, only_best, per_parameter, take, top_indices
from .registry import Registry

DEFAULT_KIND = "default"
"""The key of a floor that holds for the module types without one of their own."""


@dataclass(frozen=True)
class Forecast:
    """What is known of a choice before there are scores, provided that no score is 0.

    Args:
        units: for each weight, how many units; with global scope those of an even share.
        least: parameters in all, at least.
        most: parameters in all, at most; equal to ``least`` where the number does not depend on the scores.
    """

    units: list[int]
    least: int
    most: int


@dataclass(frozen=True)
class ThresholdPolicy(ABC):
    """How many units, and which.

    Args:
        scope: "layer" decides for each weight by itself, "global" for all weights together.
    """

    scope: str = field(default="layer", kw_only=True)
    policy: str = field(default="", init=False, kw_only=True)  # its name, so that a plain dict says what it is
    scopes: ClassVar[tuple[str, ...]] = ("layer", "global")
    name: ClassVar[str]  # set by the registry

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", self.name)
        if self.scope not in self.scopes:
            legal = " or ".join(map(repr, self.scopes))
            raise ValueError(f"{type(self).__name__}.scope must be {legal}, got {self.scope!r}")

    def choose(
        self,
        scores: Sequence[Tensor],
        costs: Sequence[int],
        kinds: Sequence[str] | None = None,
        most: int | None = None,
    ) -> list[Tensor]:
        """Choose the units that may move.

        Args:
            scores: one vector ``[units]`` for each weight, finite and not negative.
            costs: for each weight, the parameters that one of its units holds.
            kinds: for each weight, the type of its module, for floors.
            most: units that one weight may have at most: the best of those that it would have.

        Returns:
            For each weight the chosen indices, int64 on the CPU, sorted.
        """
        chosen = self._choose(scores, costs)
        if most is None:
            return chosen
        return [indices[top_indices(s[indices.to(s.device)], most)] for s, indices in zip(scores, chosen, strict=True)]

    @abstractmethod
    def _choose(self, scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
        """``choose`` without bounds."""

    def forecast(
        self, units: Sequence[int], costs: Sequence[int], kinds: Sequence[str] | None = None, most: int | None = None
    ) -> Forecast:
        """What is known before there are scores: here, that it will not be more than all.

        Args:
            units: for each weight, how many units it has; the others as for ``choose``.
        """
        bounds = _capped(units, most)
        return Forecast(bounds, 0, _parameters(bounds, costs))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _require(self, field_name: str, legal: bool, range_text: str) -> None:
        if not legal:
            value = getattr(self, field_name)
            raise ValueError(f"{type(self).__name__}.{field_name} must be {range_text}, got {value!r}")


POLICIES: Registry[type[ThresholdPolicy]] = Registry("threshold policy", named=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


@POLICIES.register("top_density")
@dataclass(frozen=True)
class TopDensity(ThresholdPolicy):
    """Keep the top fraction: ``density`` of each weight's units, or of all targeted parameters.

    FGGM's threshold: its quantile ``alpha = 0.7`` masks 70 % and updates 30 %.
    """

    density: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.density) and 0 < self.density <= 1
        self._require("density", legal, "in (0, 1]")

    def choose(self, scores, costs, kinds=None, most=None):
        if self.scope == "layer":
            return super().choose(scores, costs, kinds, most)
        # what one weight may not have goes to the others
        return best_per_parameter([only_best(s, most) for s in scores], costs, self._budget(map(len, scores), costs))

    def _choose(self, scores, costs):
        return [top_indices(s, self._units(len(s))) for s in scores]

    def forecast(self, units, costs, kinds=None, most=None):
        if self.scope == "global":
            return _even_share(_capped(units, most), costs, self._budget(units, costs), [0] * len(units))
        chosen = _capped([self._units(n) for n in units], most)
        return Forecast(chosen, _parameters(chosen, costs), _parameters(chosen, costs))

    def _units(self, units: int) -> int:
        # a weight that is targeted moves at least one unit, however small the density
        return max(1, round(self.density * units))

    def _budget(self, units, costs) -> int:
        return round(self.density * _parameters(units, costs))


@POLICIES.register("score_mass")
@dataclass(frozen=True)
class ScoreMass(ThresholdPolicy):
    """Keep the smallest set that holds ``fraction`` of the total score.

    With global scope the smallest in parameters; exact but for the float32 rounding of score / cost.
    """

    fraction: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.fraction) and 0 < self.fraction <= 1
        self._require("fraction", legal, "in (0, 1]")

    def _choose(self, scores, costs):
        if self.scope == "layer":
            return [self._holding([s], [1])[0] for s in scores]
        return self._holding(scores, costs)

    def _holding(self, scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
        ranks = per_parameter(scores, costs)
        # of the ranks, not of the scores: dividing by the cost has rounded them
        total = sum(float(rank.double().sum()) * cost for rank, cost in zip(ranks, costs, strict=True))
        mass = [lambda rank, cost=cost: rank.double() * cost for cost in costs]
        # the last entry may overshoot: the set must hold the fraction, not stay below it
        return take(ranks, mass, self.fraction * total * (1 - 1e-12), overshoot=True)


@POLICIES.register("mean_plus_std")
@dataclass(frozen=True)
class MeanPlusStd(ThresholdPolicy):
    """Keep the scores above mean + ``k`` standard deviations."""

    k: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.k) and abs(self.k) < float("inf")
        self._require("k", legal, "a finite number")

    def _choose(self, scores, costs):
        if self.scope == "layer":
            return [self._above([s])[0] for s in scores]
        ranks = per_parameter(scores, costs)
        return self._above(ranks)

    def _above(self, ranks: Sequence[Tensor]) -> list[Tensor]:
        count = sum(len(r) for r in ranks)
        mean = sum(float(r.double().sum()) for r in ranks) / count
        variance = sum(float((r.double() - mean).square().sum()) for r in ranks) / count
        return above(ranks, mean + self.k * variance**0.5)


@POLICIES.register("absolute_score")
@dataclass(frozen=True)
class AbsoluteScore(ThresholdPolicy):
    """Keep the scores above ``value``, whatever the other scores are (so there is no global scope)."""

    scopes: ClassVar[tuple[str, ...]] = ("layer",)
    value: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.value) and 0 <= self.value < float("inf")
        self._require("value", legal, "a finite number >= 0")

    def _choose(self, scores, costs):
        return above(scores, self.value)


@POLICIES.register("parameter_budget")
@dataclass(frozen=True)
class ParameterBudget(ThresholdPolicy):
    """Keep the best scores per trained parameter until ``count`` parameters are spent.

    Never more is spent, and less only by less than one unit, or because scores are 0.

    Args:
        count: parameters in all.
        floor: the share of its units, in [0, 1], that every weight gets first, its best ones, so that none
            starves: one number, or module type -> number, "default" standing for the types that are not named.
    """

    scopes: ClassVar[tuple[str, ...]] = ("global",)
    scope: str = field(default="global", kw_only=True)
    count: int = 1_000_000
    floor: float | Mapping[str, float] = field(default=0.0, hash=False)  # a dict has no hash

    def __post_init__(self):
        super().__post_init__()
        legal = isinstance(self.count, int) and not isinstance(self.count, bool) and self.count > 0
        self._require("count", legal, "an integer > 0")
        if isinstance(self.floor, Mapping):
            object.__setattr__(self, "floor", dict(self.floor))
        shares = self._shares()
        legal = all(isinstance(kind, str) and _is_number(share) and 0 <= share <= 1 for kind, share in shares.items())
        self._require("floor", legal, "in [0, 1], or a dict of module type -> a number in [0, 1]")

    def choose(self, scores, costs, kinds=None, most=None):
        floors = self._floors([len(s) for s in scores], costs, kinds, most)
        scores = [only_best(checked(s), most) for s in scores]
        first = [top_indices(s, count) for s, count in zip(scores, floors, strict=True)]
        left = self.count - _parameters(map(len, first), costs)
        others = [s.index_fill(0, taken, 0.0) if len(taken) else s for s, taken in zip(scores, first, strict=True)]
        rest = best_per_parameter(others, costs, left)
        return [torch.cat(both).sort().values for both in zip(first, rest, strict=True)]

    def _choose(self, scores, costs):
        return self.choose(scores, costs)

    def forecast(self, units, costs, kinds=None, most=None):
        floors = self._floors(units, costs, kinds, most)
        return _even_share(_capped(units, most), costs, self.count, floors)

    def _shares(self) -> dict[str, Any]:
        return self.floor if isinstance(self.floor, dict) else {DEFAULT_KIND: self.floor}

    def _floors(self, units, costs, kinds, most) -> list[int]:
        """For each weight the units that it gets first.

        Raises:
            ValueError: the budget is less than one unit or the floors, or more than may move, or a floor names a
                type that there is not.
        """
        limits = _capped(units, most)
        limit = "" if most is None else f", of which at most {most} units each may move"
        least, total = min(costs), _parameters(limits, costs)
        if not least <= self.count <= total:
            raise ValueError(
                f"ParameterBudget.count must be between one unit ({least} parameters) and the "
                f"targeted weights{limit} ({total} parameters), got {self.count}"
            )
        shares, kinds = self._shares(), kinds or [DEFAULT_KIND] * len(costs)
        if unknown := sorted(set(shares) - {DEFAULT_KIND, *kinds}):
            known = ", ".join(map(repr, sorted(set(kinds))))
            raise ValueError(f"ParameterBudget.floor names {unknown[0]!r}, but the types of modules here are {known}")
        floors = [
            min(_at_least(shares.get(kind, shares.get(DEFAULT_KIND, 0.0)), n), limit)
            for kind, n, limit in zip(kinds, units, limits, strict=True)
        ]
        if (spent := _parameters(floors, costs)) > self.count:
            raise ValueError(
                f"the floors alone take {spent} parameters and the budget is {self.count}: lower the floors or raise "
                "the budget"
            )
        return floors


def _at_least(share: float, units: int) -> int:
    return math.ceil(round(share * units, 6))  # 0.07 * 100 is a little more than 7


def _capped(units: Sequence[int], most: int | None) -> list[int]:
    return [n if most is None else min(n, most) for n in units]


def _parameters(units, costs) -> int:
    return sum(n * cost for n, cost in zip(units, costs, strict=True))


def _even_share(limits: Sequence[int], costs: Sequence[int], budget: int, floors: Sequence[int]) -> Forecast:
    """A budget that is spent over all weights, as if every weight got the same share of its units."""
    total = _parameters(limits, costs)
    if budget >= total:
        return Forecast(list(limits), total, total)
    least = _parameters(floors, costs)
    units = [f + (n - f) * (budget - least) // (total - least) for n, f in zip(limits, floors, strict=True)]
    left = budget - _parameters(units, costs)
    for weight, cost in enumerate(costs):  # what rounding down has left
        if cost <= left and units[weight] < limits[weight]:
            units[weight] += 1
            left -= cost
    if len(set(costs)) == 1:
        return Forecast(units, budget - left, budget - left)
    return Forecast(units, max(0, budget - max(costs) + 1), budget)


def policy_from_dict(data: Mapping[str, Any]) -> ThresholdPolicy:
    """The policy that ``to_dict`` described.

    Raises:
        ValueError: the policy or an argument is unknown, or the value of an argument is illegal.
    """
    return POLICIES.build(data, "policy")
