"""Is this the base that an adapter was made on? Takes and compares fingerprints of adapted layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import BaseMismatchError
from ...core.fingerprint import (
    WeightSketch,
    exact_difference,
    relative_distance,
    samples_per_weight,
    sketch_weight,
    sketches_from,
)
from ..hosts.offloading import is_offloaded
from ..hosts.sharding import is_shard

if TYPE_CHECKING:
    from ..config import FGGMConfig
    from ..layer import FGGMLayer

logger = logging.getLogger(__name__)

MAX_COSTLY = 12
"""How many weights are sampled where each has to be dequantized or brought from elsewhere for it."""

MAX_DISTANCE = {"bnb 8bit": 0.05, "bnb 4bit": 0.2}
"""``|W' - W| / |W|`` that quantizing may explain, by PEFT's name of the backend; measured in docs/format.md."""
MAX_DISTANCE_ELSEWHERE = 0.3


def fingerprint(layers: Mapping[str, FGGMLayer]) -> dict[str, str]:
    """Module path -> the sketch of its base weight, as text; without samples where the weight is not at hand."""
    costly = _chosen_costly(layers)
    count = samples_per_weight(len(costly) or len(layers))
    return {name: _sketch(layer, name, count, costly).to_text() for name, layer in layers.items()}


def require_base(layers: Mapping[str, FGGMLayer], config: FGGMConfig) -> None:
    """Raise if the layers are not on the base that the config's fingerprint was taken of.

    Raises:
        BaseMismatchError: names the first module that differs; a warning if ``config.check_base`` is False.
    """
    kept = sketches_from(config.base_fingerprint or {})
    problem = base_difference(layers, config.base_fingerprint or {})
    if problem is None:
        if kept and not any(_is_at_hand(layers[name]) for name in kept if name in layers):
            logger.warning("the base was not checked, as none of its weights is in memory yet or still whole")
        return
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    if not config.check_base:
        warnings.warn(f"the adapter was made for another base: {problem}", stacklevel=2)
        return
    raise BaseMismatchError(
        f"the adapter was made for another base: {problem}. Load the base model that its config names{base}, with the "
        "deltas merged that came before it, or pass check_base=False."
    )


@dataclass
class BaseCheck:
    """``require_base`` for a loader that brings one tensor after another: at the first of them, once.

    Args:
        layers: module path -> layer, all that the adapter has.
    """

    layers: Mapping[str, FGGMLayer]
    config: FGGMConfig
    is_done: bool = False

    def __call__(self) -> None:
        if not self.is_done:
            require_base(self.layers, self.config)
            self.is_done = True


def base_difference(layers: Mapping[str, FGGMLayer], kept: Mapping[str, str]) -> str | None:
    """In words what is not as the fingerprint says, of the first module that differs; None if all is."""
    found = {name: sketch for name, sketch in sketches_from(kept).items() if name in layers}
    for name, sketch in found.items():
        shape = tuple(layers[name].weight_shape)
        if shape != sketch.shape:
            return f"{name} is {list(shape)} here, {list(sketch.shape)} in the adapter"
    costly = _chosen_costly(layers)
    loose: dict[str, tuple[Tensor, Tensor]] = {}
    limit = 0.0
    for name, sketch in found.items():
        if sketch.samples is None:
            continue
        here = _sketch(layers[name], name, len(sketch.samples), costly)
        if here.samples is None:
            continue
        if sketch.quantized or here.quantized:
            loose[name] = sketch.samples, here.samples
            limit = max(limit, _limit(layers[name], sketch))
        elif distance := exact_difference(sketch, here):
            return f"the weight of {name} differs by {distance:.2g} of its size"
    if loose and relative_distance(list(loose.values())) > limit:
        apart = {name: relative_distance([pair]) for name, pair in loose.items()}
        name = next(name for name, distance in apart.items() if distance > limit)
        return f"the weight of {name} differs by {apart[name]:.2g} of its size, and quantizing explains {limit:g}"
    return None


def dense_weight(layer: FGGMLayer) -> Tensor:
    """The base's weight ``[o, i]`` without what is merged into it just now; not to be written to.

    Raises:
        ValueError: it is quantized, sharded, or not in memory.
    """
    weight = layer.get_base_weight().detach() if layer.quantization_backend is None else None
    if weight is None or layer._replaced_bases:
        raise ValueError("the base is quantized, and its entries are not those that new values stand for")
    if weight.is_meta or is_shard(weight):
        raise ValueError("the base's weight is " + ("on the meta device" if weight.is_meta else "sharded"))
    if layer.merged_adapters:
        weight = weight.clone()
        for name in reversed(layer.merged_adapters):
            layer._restore_(weight, name, layer.fggm_originals[name])
    return layer.matrix(weight)


def _sketch(layer: FGGMLayer, name: str, count: int, costly: set[str]) -> WeightSketch:
    shape = (int(layer.weight_shape[0]), int(layer.weight_shape[1]))
    with torch.no_grad():
        weight = _readable_weight(layer, name in costly)
        quantized = layer.quantization_backend is not None
        return WeightSketch(shape) if weight is None else sketch_weight(name, weight, count, quantized)


def _readable_weight(layer: FGGMLayer, may_cost: bool) -> Tensor | None:
    if not _is_at_hand(layer) or (_is_costly(layer) and not may_cost):
        return None
    if layer.quantization_backend is None:
        return dense_weight(layer)
    if layer._replaced_bases or not layer.quantization_backend.supports_merge:
        return None
    return layer.weight_copy()


def _is_at_hand(layer: FGGMLayer) -> bool:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    return weight is None or not (is_shard(weight) or (weight.is_meta and not is_offloaded(base)))


def _is_costly(layer: FGGMLayer) -> bool:
    return layer.quantization_backend is not None or is_offloaded(layer.get_base_layer())


def _chosen_costly(layers: Mapping[str, FGGMLayer]) -> set[str]:
    """Of the weights that cost something to look at a few, spread over the model."""
    names = [name for name, layer in layers.items() if _is_costly(layer)]
    count = min(MAX_COSTLY, len(names))
    return {names[place * (len(names) - 1) // max(1, count - 1)] for place in range(count)}


def _limit(layer: FGGMLayer, kept: WeightSketch) -> float:
    """Of what it was quantized with when the sketch was taken nothing is known."""
    backend = getattr(layer.quantization_backend, "backend_name", "")
    here = MAX_DISTANCE.get(backend, MAX_DISTANCE_ELSEWHERE) if layer.quantization_backend else 0.0
    return max(here, MAX_DISTANCE["bnb 4bit"] if kept.quantized else 0.0)
