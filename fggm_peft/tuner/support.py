"""Choosing supports: from scores, by the threshold policies, to the indices in the layers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The base model with its FGGM layers, without PEFT's and other wrappers."""
    model = without_wrappers(model)
    while callable(get := getattr(model, "get_base_model", None)):
        model = without_wrappers(get())
    return model


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
        vectors = [_checked(path, scores(path)) for path in group]
        selectable = [targets[path].granularity.selectable(vector) for path, vector in zip(group, vectors, strict=True)]
        chosen = policy.choose(selectable, [target.unit_size for target in group.values()], config.max_units)
        for path, vector, indices in zip(group, vectors, chosen, strict=True):
            total = float(vector.double().sum())
            share = float(vector[indices.to(vector.device)].double().sum()) / total if total else 0.0
            choices[path] = Choice(indices, share)
    return {path: choices[path] for path in targets}


def forecast_supports(targets: Targets, config: FGGMConfig) -> Forecast:
    """The sizes that are known without scores, in the order of the targets; ``ValueError`` if they are impossible."""
    units: dict[str, int] = {}
    least = most = 0
    for policy, group in by_policy(targets, config):
        counts, costs = zip(*((target.units, target.unit_size) for target in group.values()), strict=True)
        forecast = policy.forecast(counts, costs, config.max_units)
        limits = [target.granularity.most_units(target.shape) for target in group.values()]
        limit = sum(count * cost for count, cost in zip(limits, costs, strict=True))
        if forecast.least > limit:
            raise ValueError(
                f"{next(iter(group))}: the threshold selects {forecast.least} values, but "
                f"granularity='{config.granularity}' allows {limit} at most"
            )
        units.update(zip(group, map(min, forecast.units, limits), strict=True))
        least, most = least + forecast.least, most + min(forecast.most, limit)
    return Forecast([units[path] for path in targets], least, most)


def by_policy(targets: Targets, config: FGGMConfig) -> Iterable[tuple[ThresholdPolicy, Targets]]:
    """Each policy with the targets that it chooses from together: all of them with global scope, otherwise one."""
    groups: dict[tuple[ThresholdPolicy, str], Targets] = {}
    for path, target in targets.items():
        policy = config.policy(path)
        groups.setdefault((policy, "" if policy.scope == "global" else path), {})[path] = target
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
