"""A budget as a user says it -- a file size, a share, the size of a LoRA -- as a number of trainable values.

A form is one function in ``_FORMS``. The number is known once the targeted layers are.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from ...core.index_codec import INDEX_CODECS, most_index_bytes
from ..files.tensors import MARK, PREFIX
from .selection import size_in_bytes

if TYPE_CHECKING:
    from ..config import FGGMConfig
    from ..layer import FGGMLayer

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


def _of_bytes(text: re.Match, layers: Layers, adapter_name: str, config: FGGMConfig) -> int:
    """The most values with which the file surely is no larger, wherever they are chosen.

    Counted are the values as the file has them (as they are trained: in float32, or wider where the base is; unless
    ``delta_dtype`` says otherwise), their indices at what the codec needs at most, and the header.
    """
    size = size_in_bytes(text[0])
    codecs = next(iter(layers.values())).granularity[adapter_name].index_codecs
    width = max(_width(layer, adapter_name, config) for layer in layers.values())
    least = min(values_per_unit(layer, adapter_name) for layer in layers.values())
    sizes = [layer.granularity[adapter_name].units(layer.weight_shape) for layer in layers.values()]
    room = size - _header_bytes(layers, adapter_name, config, size)

    def fits(values: int) -> bool:
        units = min(values // least, sum(sizes))
        return values * width + most_index_bytes(codecs, units, sizes) <= room

    # the first number that does not fit; what a file takes never falls as values are added
    return bisect_left(range(max(0, room) // width + 1), True, lo=1, key=lambda values: not fits(values)) - 1


def _width(layer: FGGMLayer, adapter_name: str, config: FGGMConfig) -> int:
    """Bytes of a value in a file."""
    if config.delta_dtype is not None:
        return getattr(torch, config.delta_dtype).itemsize
    trained = layer.fggm_values[adapter_name].element_size()
    if config.training_dtype is not None:
        return trained
    # PEFT's autocast_adapter_dtype makes values of half precision float32, after they are made here
    return max(4, trained)


def _header_bytes(layers: Layers, adapter_name: str, config: FGGMConfig, size: int) -> int:
    """What a safetensors header says of the tensors of an adapter, with numbers as long as they can be."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    codecs = next(iter(layers.values())).granularity[adapter_name].index_codecs
    parts = max((INDEX_CODECS[name].parts for name in codecs), key=len)
    for name, layer in layers.items():
        granularity, (o, i) = layer.granularity[adapter_name], layer.weight_shape
        values = granularity.values_shape((o, i), granularity.units((o, i)))
        shapes = {"values": values, **dict.fromkeys(parts, (o * i, 99))}
        if adapter_name in layer.fggm_bias:
            shapes["bias"] = (o,)
        for part, shape in shapes.items():
            entry = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size]}
            entries[f"{PREFIX}{name}{MARK}{part}"] = entry
    length = len(json.dumps(entries, separators=(",", ":")).encode())
    return 8 + length + 7  # its own length before it, and blanks behind it, to a multiple of 8


def _of_share(text: re.Match, layers: Layers, adapter_name: str, config: FGGMConfig) -> int:
    total = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in layers.values())
    return int(Fraction(text[1]) / 100 * total)


def _of_lora(text: re.Match, layers: Layers, adapter_name: str, config: FGGMConfig) -> int:
    return sum(lora_values(layer, int(text[1])) for layer in layers.values())


# pattern, how it is counted, whether any model could meet it, and the rule that says so
_FORMS: list[tuple[str, Callable[..., int], Callable[[re.Match], bool], str]] = [
    (
        r"-?\d+(?:\.\d+)? ?(?:KB|MB|GB|KiB|MiB|GiB)",
        _of_bytes,
        lambda text: text[0][0] != "-" and size_in_bytes(text[0]) > 0,
        "a file size must be at least a byte, for instance '50MiB'",
    ),
    (
        r"(-?\d+(?:\.\d+)?) ?%",
        _of_share,
        lambda text: 0 < Fraction(text[1]) <= 100,
        "a share of the targeted weights must be above 0% and at most 100%, for instance '1%'",
    ),
    (
        r"lora:r=(-?\d+)",
        _of_lora,
        lambda text: int(text[1]) > 0,
        "the rank of a LoRA must be at least 1, for instance 'lora:r=16'",
    ),
]


def require_budget(value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a budget in one of its forms, and one that some model could meet."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    for pattern, _, can_be_met, rule in _FORMS if isinstance(value, str) else []:
        if match := re.fullmatch(pattern, value, re.IGNORECASE):
            if can_be_met(match):
                return
            raise ValueError(f"{rule}, got budget={value!r}")
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
    config.resolved_budget = _count(config.budget, layers, adapter_name, config)
    units = [layer.granularity[adapter_name].units(layer.weight_shape) for layer in layers.values()]
    costs = [values_per_unit(layer, adapter_name) for layer in layers.values()]
    most = sum(min(n, config.max_rows or n) * cost for n, cost in zip(units, costs, strict=True))
    if not min(costs) <= config.resolved_budget <= most:
        bound = f" (max_rows={config.max_rows})" if config.max_rows else ""
        raise ValueError(
            f"budget={config.budget!r} is {config.resolved_budget} values here. It must be at least {min(costs)}, one "
            f"{config.granularity} of the smallest module, and at most {most}, all that may move{bound}"
        )


def _count(budget: int | str, layers: Layers, adapter_name: str, config: FGGMConfig) -> int:
    if isinstance(budget, int):
        return budget
    for pattern, count, _, _ in _FORMS:
        if match := re.fullmatch(pattern, budget, re.IGNORECASE):
            return count(match, layers, adapter_name, config)
    raise AssertionError(f"require_budget has let {budget!r} pass")


def module_kind(name: str) -> str:
    """The type of a module, for floors: the last part of its path."""
    return name.rpartition(".")[2]
