"""From scores to supports: finds the adapted layers, asks the threshold policies, writes the result."""

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
from .hosts.sharding import path_in_base
from .layer import FGGMLayer
from .target import Target


@dataclass(frozen=True)
class Choice:
    """What a policy chose in one module.

    Args:
        indices: ``[k]`` int64 on the CPU, sorted.
        units: how many units there were to choose from.
        score_share: share of the module's total score that the chosen units hold, in [0, 1].
        is_zero: every score is 0, so that nothing could be chosen.
    """

    indices: Tensor
    units: int
    score_share: float
    is_zero: bool = False


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of a ``PeftModel``; its FGGM layers stay in it."""
    while callable(get := getattr(model, "get_base_model", None)):
        model = get()
    return model


def fggm_layers(model: nn.Module, adapter_name: str) -> dict[str, FGGMLayer]:
    """The layers that have the adapter, by module path within the base model."""
    return {
        path_in_base(name): module
        for name, module in model.named_modules()
        if isinstance(module, FGGMLayer) and adapter_name in module.fggm_values
    }


def module_generator(config: FGGMConfig, name: str) -> torch.Generator:
    """A generator seeded for one module by the config's seed and the module's path alone."""
    return torch.Generator().manual_seed((config.seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)


def criterion_scores(
    layer: FGGMLayer, name: str, config: FGGMConfig, adapter_name: str, **statistics: Mapping[str, Any]
) -> Tensor:
    """What the config's criterion makes of one module, ``[units]``.

    Args:
        statistics: ``task``, ``reference`` and ``reference_mean`` of ``Quantities``.
    """
    quantities = Quantities(
        granularity=layer.granularity[adapter_name],
        shape=layer.weight_shape,
        weight=layer.weight_copy,
        generator=module_generator(config, name),
        **statistics,
    )
    return CRITERIA[config.criterion].score(quantities)


def choose_supports(
    layers: dict[str, FGGMLayer],
    config: FGGMConfig,
    adapter_name: str,
    scores: Callable[[str], Tensor],
    observe: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Choice]:
    """Ask the policies which units may move; nothing in the layers is changed.

    With layer scope one module's scores exist at a time, with global scope all of them.

    Args:
        layers: module path -> layer.
        scores: module path -> ``[units]``, finite and not negative; called once for each module.
        observe: is shown the scores of each module, once they are known to be so.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite; names the module.
    """
    choices: dict[str, Choice] = {}
    for policy, names in _by_policy(layers, config):
        choices.update(_choose(policy, names, layers, config, adapter_name, scores, observe))
    return {name: choices[name] for name in layers}


def forecast_supports(layers: Mapping[str, FGGMLayer], config: FGGMConfig, adapter_name: str) -> Forecast:
    """What is known of the choice before there are scores; ``units`` in the order of the layers.

    Raises:
        ValueError: a budget that cannot be spent on these layers.
    """
    units: dict[str, int] = {}
    least = most = 0
    for policy, names in _by_policy(layers, config):
        there = [layers[name].granularity[adapter_name].units(layers[name].weight_shape) for name in names]
        forecast = policy.forecast(there, *bounds(names, layers, config, adapter_name))
        units.update(zip(names, forecast.units, strict=True))
        least, most = least + forecast.least, most + forecast.most
    return Forecast([units[name] for name in layers], least, most)


def _by_policy(layers: Iterable[str], config: FGGMConfig) -> Iterable[tuple[ThresholdPolicy, list[str]]]:
    """The modules that a policy looks at together: all of them with global scope, else one."""
    groups: dict[tuple[ThresholdPolicy, str], list[str]] = {}
    for name in layers:
        policy = config.policy(name)
        groups.setdefault((policy, "" if policy.scope == "global" else name), []).append(name)
    return [(policy, names) for (policy, _), names in groups.items()]


def bounds(names, layers, config, adapter_name) -> tuple[list[int], list[str], int | None]:
    """What a unit of each module costs, the modules' types, and the most units that one may have."""
    targets = [Target(name, layers[name], adapter_name) for name in names]
    return [t.unit_size for t in targets], [t.module_type for t in targets], config.max_units


def _choose(policy, names: list[str], layers, config, adapter_name, scores, observe) -> dict[str, Choice]:
    vectors = [scores(name) for name in names]
    for name, vector in zip(names, vectors, strict=True):
        if not all_finite(vector):
            raise NonFiniteScoreError(f"a score of module {name} is NaN or infinite")
        if (vector < 0).any():
            raise NonFiniteScoreError(f"a score of module {name} is negative; the criterion must give scores >= 0")
        if observe is not None:
            observe(name, vector)
    chosen = policy.choose(vectors, *bounds(names, layers, config, adapter_name))
    return {
        name: Choice(indices, len(vector), _share(vector, indices), not vector.any())
        for name, vector, indices in zip(names, vectors, chosen, strict=True)
    }


def _share(scores: Tensor, indices: Tensor) -> float:
    total = float(scores.double().sum())
    return float(scores[indices.to(scores.device)].double().sum()) / total if total else 0.0


def write_supports(
    layers: dict[str, FGGMLayer], config: FGGMConfig, adapter_name: str, choices: dict[str, Choice]
) -> None:
    """Give every layer its support, with values of zero (normal values if ``init_weights`` is False)."""
    for name, layer in layers.items():
        generator = None if config.init_weights else module_generator(config, name)
        layer.set_support(adapter_name, choices[name].indices, generator)
