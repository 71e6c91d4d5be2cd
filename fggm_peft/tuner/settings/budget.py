"""Settings of the size of the support: a density, a threshold policy, or a budget for the whole model."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from peft.utils.other import get_pattern_key

from ...core.index_codec import most_index_bytes
from ...core.threshold import ParameterBudget, ThresholdPolicy, TopDensity, policy_from_dict
from ..files.tensors import MARK, PREFIX
from .fields import is_integer, setting, written
from .selection import size_in_bytes

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
        "Threshold policy, instead of `density`: TopDensity, ScoreMass, MeanPlusStd or ParameterBudget, "
        "or the dict that its `to_dict` returns.",
    )
    budget: Optional[Union[int, str]] = setting(
        None,
        "Number of values that train in the whole model, instead of `density` or `threshold`: a number; a file size "
        "such as '50MiB'; a share of the targeted weights such as '1%'; or 'lora:r=16', the number of values that "
        "PEFT's LoRA of rank 16 trains on the same modules.",
    )
    budget_floor: Optional[Union[float, dict[str, float]]] = setting(
        None,
        "Part of `budget`: the least density of every module, or of each module type (the last part of the module "
        "path), e.g. {'q_proj': 0.01, 'default': 0.0}.",
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
            return self._budget_policy(count)
        if self.threshold is None:
            assert self.density is not None
            return TopDensity(density=self.density)
        assert isinstance(self.threshold, ThresholdPolicy)
        return self.threshold

    def _budget_policy(self, count: int) -> ParameterBudget:
        return ParameterBudget(count, floor=0.0 if self.budget_floor is None else self.budget_floor)

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
                    f"density_pattern ({self.density_pattern!r}) cannot be combined with budget ({self.budget!r}); "
                    "set the least density of a module type by budget_floor"
                )
        elif self.threshold is None:
            self.density = DEFAULT_DENSITY if self.density is None else self.density
            _require_density("density", self.density)
        if self.budget_floor is not None:
            if self.budget is None:
                raise ValueError(f"budget_floor ({self.budget_floor!r}) is part of a budget; give budget too")
            self._budget_policy(1)  # checks the floor's values
        if self.max_units is not None and self.max_units < 1:
            raise ValueError(f"max_units must be an integer > 0 or None, got {self.max_units!r}")


def _require_density(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")


# Budgets as text ----------------------------------------------------------------------------------


def resolve_budget_(config: FGGMConfig, targets: Targets) -> None:
    """Write the number of values of ``config.budget`` into the config; ``ValueError`` if it does not fit."""
    if config.budget is None or not targets:
        return
    config.resolved_budget = _count_values(*_parse_budget(config.budget), targets, config)
    least = min(target.unit_size for target in targets.values())
    most = sum(min(target.units, config.max_units or target.units) * target.unit_size for target in targets.values())
    if not least <= config.resolved_budget <= most:
        bound = f" (max_units={config.max_units})" if config.max_units else ""
        raise ValueError(
            f"budget={config.budget!r} is {config.resolved_budget} values on this model. It must be at least {least} "
            f"(one {config.granularity} of the smallest module) and at most {most} (all units{bound})"
        )


def _parse_budget(value: Any) -> tuple[str, Any]:
    """The kind of a budget ("values", "bytes", "share" or "rank") and its number."""
    text = value.lower() if isinstance(value, str) else ""
    if is_integer(value, 1):
        return "values", value
    if re.fullmatch(r"\d+(\.\d+)? ?[kmg]i?b", text) and (size := size_in_bytes(text)) > 0:
        return "bytes", size
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text)) and 0 < (share := Fraction(match[1]) / 100) <= 1:
        return "share", share
    if (match := re.fullmatch(r"lora:r=(\d+)", text)) and (rank := int(match[1])) > 0:
        return "rank", rank
    raise ValueError(
        "budget must be a number of values > 0, a file size such as '50MiB', a share of the targeted weights such as "
        f"'1%', at most '100%', or the size of a LoRA such as 'lora:r=16', got {value!r}"
    )


def _count_values(kind: str, number: Any, targets: Targets, config: FGGMConfig) -> int:
    if kind == "bytes":
        return _values_in_file(number, targets, config)
    if kind == "share":
        return int(number * sum(target.shape[0] * target.shape[1] for target in targets.values()))
    return sum(_lora_values(target, number) for target in targets.values()) if kind == "rank" else number


def _lora_values(target: Target, rank: int) -> int:
    o, i = target.shape
    groups = getattr(target.layer.get_base_layer(), "groups", 1)
    if rank % groups:
        raise ValueError(f"PEFT's LoRA on a convolution with {groups} groups needs a rank divisible by {groups}")
    # LoRA's first factor has every input channel of a grouped convolution; its second factor is grouped
    return rank * i * groups + o * rank // groups


def _values_in_file(size: int, targets: Targets, config: FGGMConfig) -> int:
    """The largest number of values whose file, with indices at the codec's worst case, cannot exceed the size."""
    compress = next(iter(targets.values())).granularity.compresses_indices
    width = max(_width(target, config) for target in targets.values())
    least = min(target.unit_size for target in targets.values())
    sizes = [target.units for target in targets.values()]
    available = size - _header_bytes(targets, size)

    def fits(values: int) -> bool:
        units = min(values // least, sum(sizes))
        return values * width + most_index_bytes(units, sizes, compress) <= available

    # the file never shrinks as values are added, so that bisection finds the first number that does not fit
    return bisect_left(range(max(0, available) // width + 1), True, lo=1, key=lambda values: not fits(values)) - 1


def _width(target: Target, config: FGGMConfig) -> int:
    """Bytes of a value in a file."""
    if config.delta_dtype is not None:
        return getattr(torch, config.delta_dtype).itemsize
    trained = target.values.element_size()
    # without training_dtype, PEFT's autocast_adapter_dtype converts half precision to float32 after this
    return trained if config.training_dtype is not None else max(4, trained)


def _header_bytes(targets: Targets, size: int) -> int:
    """Size of a safetensors header with the tensors of an adapter, with numbers as long as they can be."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for path, target in targets.items():
        o, i = target.shape
        values = target.granularity.values_shape((o, i), target.units)
        for part, shape in (("values", values), ("indices", (o * i,))):
            entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size]}
            entries[f"{PREFIX}{path}{MARK}{part}"] = entry
    length = len(json.dumps(entries, separators=(",", ":")).encode())
    return 8 + length + 7  # 8 bytes for the length, and padding to a multiple of 8
