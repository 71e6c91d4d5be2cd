"""A budget as a user says it -- a file size, a share, the size of a LoRA -- as a number of trainable values.

A form is one function in ``_FORMS``. The number is known once the targeted layers are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from accelerate.utils.modeling import convert_file_size_to_int

if TYPE_CHECKING:
    from .config import FGGMConfig
    from .layer import FGGMLayer

Layers = Mapping[str, "FGGMLayer"]


def values_per_unit(layer: FGGMLayer, adapter_name: str) -> int:
    """What one unit trains: its weight entries, and a bias entry if the adapter has them."""
    entries = layer.granularity[adapter_name].parameters_per_unit(layer.weight_shape)
    return entries + (adapter_name in layer.fggm_bias)


def lora_values(layer: FGGMLayer, rank: int) -> int:
    """The values that PEFT's LoRA of this rank trains on the layer.

    Raises:
        ValueError: PEFT has no LoRA of this rank for it.
    """
    o, i = layer.weight_shape
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if rank % groups:
        raise ValueError(f"PEFT's LoRA on a convolution with {groups} groups needs a rank divisible by {groups}")
    # of a grouped convolution, LoRA's first factor sees every input channel and its second is grouped
    return rank * i * groups + o * rank // groups


def _of_bytes(text: re.Match, layers: Layers, adapter_name: str) -> int:
    """The most values that surely fit, with their indices, wherever they are chosen.

    Values count as they are trained: in float32, or wider where the base is; indices as they are in memory. The file
    of single elements is smaller, as it encodes them.
    """
    size = convert_file_size_to_int(text[0].replace(" ", ""))
    per_value = []
    for layer in layers.values():
        values = values_per_unit(layer, adapter_name)
        # PEFT's autocast_adapter_dtype makes values of half precision float32, after they are made here
        width = max(4, layer.fggm_values[adapter_name].element_size())
        per_value.append(Fraction(values * width + layer.fggm_indices[adapter_name].element_size(), values))
    return int(size / max(per_value))


def _of_share(text: re.Match, layers: Layers, adapter_name: str) -> int:
    total = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in layers.values())
    return int(Fraction(text[1]) / 100 * total)


def _of_lora(text: re.Match, layers: Layers, adapter_name: str) -> int:
    return sum(lora_values(layer, int(text[1])) for layer in layers.values())


_FORMS: list[tuple[str, Callable[[re.Match, Layers, str], int]]] = [
    (r"\d+(?:\.\d+)? ?(?:KB|MB|GB|KiB|MiB|GiB)", _of_bytes),
    (r"(\d+(?:\.\d+)?) ?%", _of_share),
    (r"lora:r=(\d+)", _of_lora),
]


def require_budget(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a budget in one of its forms."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    if isinstance(value, str) and any(re.fullmatch(pattern, value) for pattern, _ in _FORMS):
        return
    raise ValueError(
        f"budget must be a number of values (an integer > 0), a file size such as '50MiB', a share of the targeted "
        f"weights such as '1%', or the size of a LoRA such as 'lora:r=16', got {value!r}"
    )


def resolve_budget_(config: FGGMConfig, layers: Layers, adapter_name: str) -> None:
    """Write the number of values that ``config.budget`` stands for on these layers into the config.

    Raises:
        ValueError: it is less than one unit or the floors, or more than may move; says the least and the most.
    """
    if config.budget is None or not layers:
        return
    config.resolved_budget = _count(config.budget, layers, adapter_name)
    units = [layer.granularity[adapter_name].units(layer.weight_shape) for layer in layers.values()]
    costs = [values_per_unit(layer, adapter_name) for layer in layers.values()]
    most = sum(min(n, config.max_rows or n) * cost for n, cost in zip(units, costs, strict=True))
    if not min(costs) <= config.resolved_budget <= most:
        bound = f" (max_rows={config.max_rows})" if config.max_rows else ""
        raise ValueError(
            f"budget={config.budget!r} is {config.resolved_budget} values here. It must be at least {min(costs)}, one "
            f"{config.granularity} of the smallest module, and at most {most}, all that may move{bound}"
        )


def _count(budget: int | str, layers: Layers, adapter_name: str) -> int:
    if isinstance(budget, int):
        return budget
    for pattern, count in _FORMS:
        if match := re.fullmatch(pattern, budget):
            return count(match, layers, adapter_name)
    raise AssertionError(f"require_budget has let {budget!r} pass")


def module_kind(name: str) -> str:
    """The type of a module, for floors: the last part of its path."""
    return name.rpartition(".")[2]
