"""Settings of the size of the support: a density, a threshold policy, or a budget for the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Optional, Union

from peft.utils.other import get_pattern_key

from ...core.threshold import ParameterBudget, ThresholdPolicy, TopDensity, policy_from_dict
from .fields import is_integer, setting, written

if TYPE_CHECKING:
    from ..config import FGGMConfig
    from ..target import Target, Targets

DEFAULT_DENSITY = 0.3


@dataclass
class BudgetSettings:
    """Fields of ``FGGMConfig`` that say how many units are selected."""

    density: Optional[float] = setting(
        None,
        "Share of each targeted weight that trains, in (0, 1]; 0.3 if neither this, `threshold` nor `budget` is given.",
    )
    threshold: Optional[Union[ThresholdPolicy, dict[str, Any]]] = setting(
        None,
        "Threshold policy, instead of `density`: TopDensity, ScoreMass, MeanPlusStd or "
        "ParameterBudget, or the dict that its `to_dict` returns.",
    )
    budget: Optional[Union[int, str]] = setting(
        None,
        "Number of values that train in the whole model, instead of `density` or `threshold`: a number; a share "
        "of the targeted weights such as '1%'; or 'lora:r=16', the number of values that PEFT's LoRA of rank 16 trains "
        "on the same modules.",
    )
    max_units: Optional[int] = setting(
        None,
        "Largest number of units in one module. A delta of k rows or columns is a LoRA of rank k.",
    )
    density_pattern: Optional[dict[str, float]] = setting(
        None,
        "Module names or regexes with a density of their own, e.g. {'q_proj': 0.1}; `density` or `threshold` applies "
        "to the other modules.",
    )
    resolved_budget: Optional[int] = written("Number of values of `budget` on the targeted modules.")

    def policy(self, module_name: str | None = None) -> ThresholdPolicy:
        """The threshold policy of a module; without a name, that of the modules not in ``density_pattern``."""
        patterns = self.density_pattern or {}
        if module_name is not None and (key := get_pattern_key(patterns.keys(), module_name)) in patterns:
            return TopDensity(density=patterns[key])
        if self.budget is not None:
            count = self.budget if isinstance(self.budget, int) else self.resolved_budget
            if count is None:
                raise ValueError(f"budget={self.budget!r} becomes a number when the adapter is added to a model")
            return ParameterBudget(count)
        if self.threshold is None:
            assert self.density is not None
            return TopDensity(density=self.density)
        assert isinstance(self.threshold, ThresholdPolicy)
        return self.threshold

    def _check_budget(self) -> None:
        self.density_pattern = dict(self.density_pattern or {})
        for pattern, density in self.density_pattern.items():
            _require_density(f"density_pattern[{pattern!r}]", density)
        if isinstance(self.threshold, dict):
            self.threshold = policy_from_dict(self.threshold)
        given = [name for name in ("budget", "density", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError("give " + " or ".join(f"{n} ({getattr(self, n)!r})" for n in given[:2]) + ", not both")
        if self.budget is not None:
            _parse_budget(self.budget)
            if self.density_pattern:
                raise ValueError(
                    f"density_pattern ({self.density_pattern!r}) cannot be combined with budget ({self.budget!r})"
                )
        elif self.threshold is None:
            self.density = DEFAULT_DENSITY if self.density is None else self.density
            _require_density("density", self.density)
        if self.max_units is not None and self.max_units < 1:
            raise ValueError(f"max_units must be an integer > 0 or None, got {self.max_units!r}")


def _require_density(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


# Budgets as text ----------------------------------------------------------------------------------


def resolve_budget_(config: FGGMConfig, targets: Targets) -> None:
    """Write the number of values of ``config.budget`` into the config."""
    if config.budget is None or not targets:
        return
    kind, number = _parse_budget(config.budget)
    if kind == "share":
        number = max(1, int(number * sum(target.shape[0] * target.shape[1] for target in targets.values())))
    elif kind == "rank":
        number = sum(_lora_values(target, number) for target in targets.values())
    config.resolved_budget = number


def _parse_budget(value: Any) -> tuple[str, Any]:
    """The kind of a budget ("values", "share" or "rank") and its number."""
    text = value.lower() if isinstance(value, str) else ""
    if is_integer(value, 1):
        return "values", value
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)) and 0 < (share := Fraction(match[1]) / 100) <= 1:
        return "share", share
    if (match := re.fullmatch(r"lora:r=(\d+)", text)) and (rank := int(match[1])) > 0:
        return "rank", rank
    raise ValueError(
        "budget must be a number of values > 0, a share of the targeted weights such as '1%', at most '100%', or the "
        f"size of a LoRA such as 'lora:r=16', got {value!r}"
    )


def _lora_values(target: Target, rank: int) -> int:
    o, i = target.shape
    groups = getattr(target.layer.get_base_layer(), "groups", 1)
    if rank % groups:
        raise ValueError(f"PEFT's LoRA on a convolution with {groups} groups needs a rank divisible by {groups}")
    # LoRA's first factor has every input channel of a grouped convolution; its second factor is grouped
    return rank * i * groups + o * rank // groups
