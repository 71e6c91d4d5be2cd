"""Threshold policies: from the scores of units to the units that are selected.

A policy is a frozen dataclass that converts to JSON and back. With ``scope="layer"`` it decides for each weight by
itself; with ``scope="global"`` it ranks the units of all weights together by score per trained parameter.

Every policy keeps three promises: it selects exactly the promised number of units, ties go to the lower index, and a
unit whose score is 0 is never selected (otherwise the order of ties could make a dead row trainable). The caller may
limit the number of units of one weight.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .ranking import best_per_parameter, only_best, per_parameter, take, top_indices
from .registry import Registry


class Forecast(NamedTuple):
    """The size of a selection before there are scores, provided that no score is 0."""

    units: list[int]  # of each weight; with global scope, of an even share
    least: int  # number of parameters
    most: int  # equal to ``least`` if the number does not depend on the scores


def limited(default: Any, legal: Callable[[Any], bool], description: str) -> Any:
    """A dataclass field of a policy whose value must be ``legal``, as ``description`` says in the error message."""
    return field(default=default, metadata={"legal": legal, "description": description})


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_finite(value) and 0 < value <= 1


@dataclass(frozen=True)
class ThresholdPolicy(ABC):
    """How many units are selected, and which: for each weight by itself, or for all together (``scope``)."""

    name: ClassVar[str]  # set by the registry
    scopes: ClassVar[tuple[str, ...]] = ("layer", "global")
    scope: str = field(default="layer", kw_only=True)
    policy: str = field(default="", init=False, kw_only=True)  # the name, so that the policy's dict contains it

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", self.name)
        if self.scope not in self.scopes:
            legal = " or ".join(map(repr, self.scopes))
            raise ValueError(f"{type(self).__name__}.scope must be {legal}, got {self.scope!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata.get("legal", lambda _: True)(value):
                raise ValueError(f"{type(self).__name__}.{f.name} must be {f.metadata['description']}, got {value!r}")

    @abstractmethod
    def select(self, scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
        """Select units without limits; with ``scope="layer"`` one weight at a time, at a cost of 1."""

    def choose(self, scores: Sequence[Tensor], costs: Sequence[int], most: int | None = None) -> list[Tensor]:
        """Select units within limits: for each weight the chosen indices, int64 on the CPU, sorted.

        Args:
            scores: one vector ``[units]`` for each weight, finite and not negative.
            costs: for each weight, the number of parameters of one unit.
            most: the largest number of units of one weight; the best ones are kept.
        """
        by_layer = self.scope == "layer"
        chosen = [self.select([s], [1])[0] for s in scores] if by_layer else self.select(scores, costs)
        if most is None:
            return chosen
        return [indices[top_indices(s[indices.to(s.device)], most)] for s, indices in zip(scores, chosen, strict=True)]

    def forecast(self, units: Sequence[int], costs: Sequence[int], most: int | None = None) -> Forecast:
        """The size of the selection before there are scores; by default between nothing and everything."""
        limits = _capped(units, most)
        return Forecast(limits, 0, _parameters(limits, costs))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


POLICIES: Registry[type[ThresholdPolicy]] = Registry("threshold policy", named=True)


def policy_from_dict(data: Mapping[str, Any]) -> ThresholdPolicy:
    """The inverse of ``ThresholdPolicy.to_dict``; ``ValueError`` if a name or a value is illegal."""
    return POLICIES.build(data, "policy")


@POLICIES.register("top_density")
@dataclass(frozen=True)
class TopDensity(ThresholdPolicy):
    """Select the top fraction: ``density`` of each weight's units, or of all targeted parameters.

    This is FGGM's threshold: its quantile ``alpha = 0.7`` masks 70 % and updates 30 %.
    """

    density: float = limited(0.3, _is_share, "in (0, 1]")

    def choose(self, scores, costs, most=None):
        if self.scope == "layer":
            return super().choose(scores, costs, most)
        return self.select([only_best(s, most) for s in scores], costs)  # other weights get what a limit excludes

    def select(self, scores, costs):
        if self.scope == "layer":
            return [top_indices(s, self._units(len(s))) for s in scores]
        return best_per_parameter(scores, costs, self._budget(map(len, scores), costs))

    def forecast(self, units, costs, most=None):
        if self.scope == "global":
            return _even_share(_capped(units, most), costs, self._budget(units, costs))
        chosen = _capped([self._units(n) for n in units], most)
        return Forecast(chosen, _parameters(chosen, costs), _parameters(chosen, costs))

    def _units(self, units: int) -> int:
        return max(1, round(self.density * units))  # every targeted weight gets a unit, however small the density

    def _budget(self, units, costs) -> int:
        return round(self.density * _parameters(units, costs))


@POLICIES.register("score_mass")
@dataclass(frozen=True)
class ScoreMass(ThresholdPolicy):
    """Select the smallest set that has ``fraction`` of the total score.

    With global scope it is the smallest in parameters, exact up to the float32 rounding of score / cost.
    """

    fraction: float = limited(0.9, _is_share, "in (0, 1]")

    def select(self, scores, costs):
        ranks = per_parameter(scores, costs)
        # the sum of the ranks, not of the scores, because the division by the cost has rounded them
        total = sum(float(rank.double().sum()) * cost for rank, cost in zip(ranks, costs, strict=True))
        mass = [lambda rank, cost=cost: rank.double() * cost for cost in costs]
        # the last entry may overshoot: the set must have at least the fraction
        return take(ranks, mass, self.fraction * total * (1 - 1e-12), overshoot=True)


@POLICIES.register("mean_plus_std")
@dataclass(frozen=True)
class MeanPlusStd(ThresholdPolicy):
    """Select the scores above mean + ``k`` standard deviations."""

    k: float = limited(1.0, _is_finite, "a finite number")

    def select(self, scores, costs):
        ranks = per_parameter(scores, costs)
        count = sum(len(r) for r in ranks)
        mean = sum(float(r.double().sum()) for r in ranks) / count
        variance = sum(float((r.double() - mean).square().sum()) for r in ranks) / count
        bound = max(0.0, mean + self.k * variance**0.5)  # a score of 0 is never selected
        return [(r.double() > bound).nonzero().flatten().cpu() for r in ranks]


@POLICIES.register("parameter_budget")
@dataclass(frozen=True)
class ParameterBudget(ThresholdPolicy):
    """Select the best scores per trained parameter until ``count`` parameters are spent.

    It never spends more. It spends less only by less than one unit, or because scores are 0.

    Args:
        count: number of parameters in total.
    """

    scopes: ClassVar[tuple[str, ...]] = ("global",)
    scope: str = field(default="global", kw_only=True)
    count: int = limited(
        1_000_000, lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0, "an integer > 0"
    )

    def select(self, scores, costs):
        return self.choose(scores, costs)

    def choose(self, scores, costs, most=None):
        self._require_possible([len(s) for s in scores], costs, most)
        return best_per_parameter([only_best(s, most) for s in scores], costs, self.count)

    def forecast(self, units, costs, most=None):
        self._require_possible(units, costs, most)
        return _even_share(_capped(units, most), costs, self.count)

    def _require_possible(self, units, costs, most) -> None:
        least, total = min(costs), _parameters(_capped(units, most), costs)
        if not least <= self.count <= total:
            limit = "" if most is None else f" with at most {most} units each"
            raise ValueError(
                f"a budget of {self.count} values is impossible here: it must be at least {least} (one unit) and at "
                f"most {total} (the targeted weights{limit})"
            )


def _capped(units: Sequence[int], most: int | None) -> list[int]:
    return [n if most is None else min(n, most) for n in units]


def _parameters(units, costs) -> int:
    return sum(n * cost for n, cost in zip(units, costs, strict=True))


def _even_share(limits: Sequence[int], costs: Sequence[int], budget: int) -> Forecast:
    """The forecast of a budget for all weights, as if every weight got the same share of its units."""
    total = _parameters(limits, costs)
    if budget >= total:
        return Forecast(list(limits), total, total)
    units = [n * budget // total for n in limits]
    left = budget - _parameters(units, costs)
    for weight, cost in enumerate(costs):  # spend what rounding down has left
        if cost <= left and units[weight] < limits[weight]:
            units[weight] += 1
            left -= cost
    if len(set(costs)) == 1:
        return Forecast(units, budget - left, budget - left)
    return Forecast(units, max(0, budget - max(costs) + 1), budget)
