"""Threshold policies: scores of units -> which units may move.

A policy is a frozen dataclass that goes to JSON and back. ``scope="layer"`` looks at one weight at a
time, ``scope="global"`` at all of them together, ranked by score per trained parameter.

Three promises hold for every policy: exactly the promised number of units is chosen, ties go to the
lower index, and a unit whose score is 0 is never chosen (a dead row would become trainable through
the order of ties). Everything is decided on the CPU, so that the same scores give the same support
on every device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import NonFiniteScoreError
from .registry import Registry

_LOW_BITS = 16
_BINS = 1 << _LOW_BITS
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ThresholdPolicy(ABC):
    """How many units, and which.

    Args:
        scope: "layer" decides for each weight by itself, "global" for all weights together.
    """

    scope: str = field(default="layer", kw_only=True)
    policy: str = field(default="", init=False, kw_only=True)  # its name, so that a plain dict says what it is
    scopes: ClassVar[tuple[str, ...]] = ("layer", "global")
    name: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", self.name)
        if self.scope not in self.scopes:
            legal = " or ".join(map(repr, self.scopes))
            raise ValueError(f"{type(self).__name__}.scope must be {legal}, got {self.scope!r}")

    @abstractmethod
    def choose(self, scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
        """Choose the units that may move.

        Args:
            scores: one vector ``[units]`` for each weight, finite and not negative.
            costs: for each weight, the parameters that one of its units holds.

        Returns:
            For each weight the chosen indices, int64 on the CPU, sorted.
        """

    def promised(self, units: Sequence[int], costs: Sequence[int]) -> int:
        """How many parameters it chooses of such weights at least, if enough scores are positive.

        Of a policy that adapts to the scores it is one unit.

        Args:
            units: for each weight (one of scope "layer", all of scope "global") how many units it has.
            costs: for each weight, the parameters that one of its units holds.
        """
        return min(costs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def _require(self, field_name: str, legal: bool, range_text: str) -> None:
        if not legal:
            value = getattr(self, field_name)
            raise ValueError(f"{type(self).__name__}.{field_name} must be {range_text}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


@dataclass(frozen=True)
class TopDensity(ThresholdPolicy):
    """Keep the top fraction: ``density`` of each weight's units, or of all targeted parameters.

    FGGM's threshold: its quantile ``alpha = 0.7`` masks 70 % and updates 30 %.
    """

    name: ClassVar[str] = "top_density"
    density: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.density) and 0 < self.density <= 1
        self._require("density", legal, "in (0, 1]")

    def promised(self, units, costs):
        if self.scope == "global":
            return round(self.density * sum(n * cost for n, cost in zip(units, costs, strict=True)))
        return self._count(units[0]) * costs[0]

    def _count(self, units: int) -> int:
        # a weight that is targeted moves at least one unit, however small the density
        return max(1, round(self.density * units))

    def choose(self, scores, costs):
        if self.scope == "global":
            return _best_per_parameter(scores, costs, self.promised([len(s) for s in scores], costs))
        return [_top(s, self._count(len(s))) for s in scores]


@dataclass(frozen=True)
class ScoreMass(ThresholdPolicy):
    """Keep the smallest set that holds ``fraction`` of the total score.

    With global scope the smallest in parameters; exact but for the float32 rounding of score / cost.
    """

    name: ClassVar[str] = "score_mass"
    fraction: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.fraction) and 0 < self.fraction <= 1
        self._require("fraction", legal, "in (0, 1]")

    def choose(self, scores, costs):
        if self.scope == "layer":
            return [self._holding([s], [1])[0] for s in scores]
        return self._holding(scores, costs)

    def _holding(self, scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
        ranks = _per_parameter(scores, costs)
        # of the ranks, not of the scores: dividing by the cost has rounded them
        total = sum(float(rank.double().sum()) * cost for rank, cost in zip(ranks, costs, strict=True))
        mass = [lambda rank, cost=cost: rank.double() * cost for cost in costs]
        # the last entry may overshoot: the set must hold the fraction, not stay below it
        return _take(ranks, mass, self.fraction * total * (1 - 1e-12), overshoot=True)


@dataclass(frozen=True)
class MeanPlusStd(ThresholdPolicy):
    """Keep the scores above mean + ``k`` standard deviations."""

    name: ClassVar[str] = "mean_plus_std"
    k: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.k) and abs(self.k) < float("inf")
        self._require("k", legal, "a finite number")

    def choose(self, scores, costs):
        if self.scope == "layer":
            return [self._above([s])[0] for s in scores]
        ranks = _per_parameter(scores, costs)
        return self._above(ranks)

    def _above(self, ranks: Sequence[Tensor]) -> list[Tensor]:
        count = sum(len(r) for r in ranks)
        mean = sum(float(r.double().sum()) for r in ranks) / count
        variance = sum(float((r.double() - mean).square().sum()) for r in ranks) / count
        return _above(ranks, mean + self.k * variance**0.5)


@dataclass(frozen=True)
class AbsoluteScore(ThresholdPolicy):
    """Keep the scores above ``value``, whatever the other scores are (so there is no global scope)."""

    name: ClassVar[str] = "absolute_score"
    scopes: ClassVar[tuple[str, ...]] = ("layer",)
    value: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        legal = _is_number(self.value) and 0 <= self.value < float("inf")
        self._require("value", legal, "a finite number >= 0")

    def choose(self, scores, costs):
        return _above(scores, self.value)


@dataclass(frozen=True)
class ParameterBudget(ThresholdPolicy):
    """Keep the best scores per trained parameter until ``count`` parameters are spent."""

    name: ClassVar[str] = "parameter_budget"
    scopes: ClassVar[tuple[str, ...]] = ("global",)
    scope: str = field(default="global", kw_only=True)
    count: int = 1_000_000

    def __post_init__(self):
        super().__post_init__()
        legal = isinstance(self.count, int) and not isinstance(self.count, bool) and self.count > 0
        self._require("count", legal, "an integer > 0")

    def promised(self, units, costs):
        return self.count

    def choose(self, scores, costs):
        total = sum(len(s) * cost for s, cost in zip(scores, costs, strict=True))
        if not min(costs) <= self.count <= total:
            raise ValueError(
                f"ParameterBudget.count must be between one unit ({min(costs)} parameters) and the "
                f"targeted weights ({total} parameters), got {self.count}"
            )
        return _best_per_parameter(scores, costs, self.count)


POLICIES: Registry[type[ThresholdPolicy]] = Registry("threshold policy")
for _policy in (TopDensity, ScoreMass, MeanPlusStd, AbsoluteScore, ParameterBudget):
    POLICIES.register(_policy.name, _policy)


def policy_from_dict(data: Mapping[str, Any]) -> ThresholdPolicy:
    """The policy that ``to_dict`` described.

    Raises:
        ValueError: an unknown policy, an unknown argument, or a value out of range.
    """
    arguments = dict(data)
    policy = POLICIES[arguments.pop("policy", None)]
    known = {f.name for f in fields(policy)} - {"policy"}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"{policy.__name__} has no argument {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    return policy(**arguments)


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest positive scores, sorted; ties go to the lower index."""
    return _top(scores, count)


def _checked(scores: Tensor) -> Tensor:
    scores = scores.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise NonFiniteScoreError("scores must be finite and not negative")
    return scores


def _per_parameter(scores: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
    return [_checked(s) / cost for s, cost in zip(scores, costs, strict=True)]


def _above(scores: Sequence[Tensor], threshold: float) -> list[Tensor]:
    bound = max(threshold, 0.0)
    return [(_checked(s).double() > bound).nonzero().flatten() for s in scores]


def _top(scores: Tensor, count: int) -> Tensor:
    return _take([_checked(scores)], [torch.ones_like], count)[0]


def _best_per_parameter(scores, costs, budget: int) -> list[Tensor]:
    weigh = [lambda rank, cost=cost: torch.full_like(rank, cost, dtype=torch.float64) for cost in costs]
    return _take(_per_parameter(scores, costs), weigh, budget)


Weigh = Callable[[Tensor], Tensor]


def _take(ranks: Sequence[Tensor], weigh: Sequence[Weigh], budget: float, overshoot: bool = False) -> list[Tensor]:
    """Take entries from the highest rank down until their weights reach ``budget``.

    Two passes of histograms over the bit patterns find the rank of the last entry exactly; among
    entries of that rank those with lower (weight, index) come first. Memory beyond the ranks is a
    few MiB; the ranks of 1e8 entries take about 15 times what summing them takes.

    Args:
        ranks: for each weight, ``[units]`` float32, finite, >= 0, on the CPU.
        weigh: for each weight, ranks -> what their entries weigh, float64.
        budget: the total weight to reach.
        overshoot: take the entry that crosses the budget too; otherwise stop before it.
    """
    if budget <= 0:
        return [torch.empty(0, dtype=torch.int64) for _ in ranks]
    high, left = _cutoff(ranks, weigh, budget, lambda bits: bits >> _LOW_BITS, None)
    low, left = _cutoff(ranks, weigh, left, lambda bits: bits & (_BINS - 1), high)
    cut = (high << _LOW_BITS) | low
    chosen = []
    for rank, weight_of in zip(ranks, weigh, strict=True):
        bits = rank.view(torch.int32)
        take = bits > cut
        ties = ((bits == cut) & (bits > 0)).nonzero().flatten()
        if len(ties) and left > 0:
            each = float(weight_of(rank[ties[:1]]).double()[0])
            wanted = left / each
            count = min(len(ties), -int(-wanted // 1) if overshoot else int(wanted + 1e-9))
            take[ties[:count]] = True
            left -= count * each
        chosen.append((take & (bits > 0)).nonzero().flatten())
    return chosen


def _cutoff(ranks, weigh, budget: float, bin_of, inside: int | None) -> tuple[int, float]:
    """The bin in which the running weight from the top passes ``budget``, and what is left for it."""
    totals = torch.zeros(_BINS, dtype=torch.float64)
    for rank, weight_of in zip(ranks, weigh, strict=True):
        for chunk in rank.split(_CHUNK):
            bits = chunk.view(torch.int32)
            keep = bits > 0
            if inside is not None:
                keep &= (bits >> _LOW_BITS) == inside
            bits, chunk = bits[keep], chunk[keep]
            totals += torch.bincount(bin_of(bits), weight_of(chunk).double(), minlength=_BINS)
    from_top = totals.flip(0).cumsum(0)
    passed = (from_top >= budget).nonzero().flatten()
    if not len(passed):  # everything fits: cut below the smallest bin, so that all are taken
        return 0, budget
    position = int(passed[0])
    before = float(from_top[position - 1]) if position else 0.0
    return _BINS - 1 - position, budget - before
