"""Choosing supports: from scores, by the threshold policies, to the indices in the layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftMixedModel
from torch import Tensor, nn

from ..core.criteria import CRITERIA, Quantities
from ..core.errors import NonFiniteScoreError
from ..core.ranking import all_finite
from ..core.threshold import Forecast, ThresholdPolicy
from .config import FGGMConfig
from .hosts.sharding import without_wrappers
from .target import Target, Targets


@dataclass(frozen=True)
class Choice:
    """The units that a policy chose in one module.

    Args:
        indices: ``[k]`` int64 on the CPU, sorted.
        score_share: share of the module's total score that the chosen units have, in [0, 1].
    """

    indices: Tensor
    score_share: float = 0.0


@dataclass(frozen=True)
class Together:
    """Targets that select the same units: one weight, or the projections of one attention if the units are heads."""

    targets: Targets

    @property
    def first(self) -> Target:
        """One of the targets. All have the same number of units."""
        return next(iter(self.targets.values()))

    @property
    def unit_size(self) -> int:
        """Number of values that one unit trains, in all targets."""
        return sum(target.unit_size for target in self.targets.values())

    def scores(self, of: Callable[[str], Tensor]) -> Tensor:
        """The scores of the units, ``[units]``: the sum over the targets; ``of`` returns those of one module.

        Raises:
            NonFiniteScoreError: a score is NaN, infinite or negative; names the module.
        """
        vectors = [_checked(path, of(path)) for path in self.targets]
        return vectors[0] if len(vectors) == 1 else torch.stack([vector.cpu() for vector in vectors]).sum(0)


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model with its FGGM layers, without PEFT's and other wrappers."""
    model = without_wrappers(model)
    while callable(get := getattr(model, "get_base_model", None)):
        model = without_wrappers(get())
    return model.base_model.model if isinstance(model, PeftMixedModel) else model


def _generator(config: FGGMConfig, path: str) -> torch.Generator:
    return torch.Generator().manual_seed((config.seed * 0x9E3779B1 + zlib.crc32(path.encode())) % 2**63)


def criterion_scores(target: Target, config: FGGMConfig, **statistics: Any) -> Tensor:
    """The scores of the config's criterion for one weight, ``[units]``; ``statistics`` are fields of ``Quantities``."""
    weight, generator = target.layer.weight_copy, _generator(config, target.path)
    quantities = Quantities(target.granularity, target.shape, weight=weight, generator=generator, **statistics)
    return CRITERIA[config.criterion].score(quantities)


def choose_supports(targets: Targets, config: FGGMConfig, scores: Callable[[str], Tensor]) -> dict[str, Choice]:
    """Choose units by the config's policies, without changing the layers.

    Args:
        scores: module path -> ``[units]``, called once for each module; one at a time with layer scope.

    Raises:
        NonFiniteScoreError: a score is NaN, infinite or negative; names the module.
    """
    choices: dict[str, Choice] = {}
    for policy, group in by_policy(targets, config):
        vectors = [part.scores(scores) for part in group]
        selectable = [part.first.granularity.selectable(vector) for part, vector in zip(group, vectors, strict=True)]
        chosen = policy.choose(selectable, [part.unit_size for part in group], config.max_units)
        for part, vector, indices in zip(group, vectors, chosen, strict=True):
            total = float(vector.double().sum())
            share = float(vector[indices.to(vector.device)].double().sum()) / total if total else 0.0
            choices |= dict.fromkeys(part.targets, Choice(indices, share))
    return {path: choices[path] for path in targets}


def forecast_supports(targets: Targets, config: FGGMConfig) -> Forecast:
    """The sizes that are known without scores, in the order of the targets; ``ValueError`` if they are impossible."""
    units: dict[str, int] = {}
    least = most = 0
    for policy, group in by_policy(targets, config):
        costs = [part.unit_size for part in group]
        forecast = policy.forecast([part.first.units for part in group], costs, config.max_units)
        limits = [part.first.granularity.most_units(part.first.shape) for part in group]
        limit = sum(count * cost for count, cost in zip(limits, costs, strict=True))
        if forecast.least > limit:
            raise ValueError(
                f"{group[0].first.path}: the threshold selects {forecast.least} values, but "
                f"granularity='{config.granularity}' allows {limit} at most"
            )
        for part, count in zip(group, map(min, forecast.units, limits), strict=True):
            units |= dict.fromkeys(part.targets, count)
        least, most = least + forecast.least, most + min(forecast.most, limit)
    return Forecast([units[path] for path in targets], least, most)


def selected_together(targets: Targets, config: FGGMConfig) -> dict[str, Together]:
    """The targets by the name of what they belong to: their own path, or the attention if the units are heads."""
    parts: dict[str, Targets] = {}
    for path, target in targets.items():
        parts.setdefault(config.granularity.group_of(path), {})[path] = target
    return {name: Together(part) for name, part in parts.items()}


def by_policy(targets: Targets, config: FGGMConfig) -> Iterable[tuple[ThresholdPolicy, list[Together]]]:
    """Each policy with what it ranks together: everything with global scope, otherwise one vector of scores.

    Raises:
        ValueError: ``density_pattern`` gives targets that select the same units different densities.
    """
    groups: dict[tuple[ThresholdPolicy, str], list[Together]] = {}
    for name, part in selected_together(targets, config).items():
        policy, *others = {config.policy(path) for path in part.targets}
        if others:
            paths = ", ".join(part.targets)
            raise ValueError(f"{paths} select the same units, but density_pattern gives them different densities")
        groups.setdefault((policy, "" if policy.scope == "global" else name), []).append(part)
    return [(policy, group) for (policy, _), group in groups.items()]


def _checked(path: str, scores: Tensor) -> Tensor:
    if not all_finite(scores) or (scores < 0).any():
        raise NonFiniteScoreError(f"a score of module {path} is NaN, infinite or negative")
    return scores


def write_supports(targets: Targets, config: FGGMConfig, choices: Mapping[str, Choice]) -> None:
    """Set the support of every target, with values of zero (normal values if ``init_weights`` is False)."""
    for path, target in targets.items():
        generator = None if config.init_weights else _generator(config, path)
        target.layer.set_support(target.adapter_name, choices[path].indices, generator)
