"""Checks that a model is the base that an adapter was made on, by comparing fingerprints of the adapted layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
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
"""Number of weights that are sampled if each must be dequantized or moved for it."""

MAX_DISTANCE = {"bnb 8bit": 0.05, "bnb 4bit": 0.2}
"""Largest ``|W' - W| / |W|`` that quantization explains, by PEFT's backend name; measured in docs/format.md."""
MAX_DISTANCE_ELSEWHERE = 0.3


def fingerprint(layers: Mapping[str, FGGMLayer]) -> dict[str, str]:
    """Module path -> text of the sketch of its base weight; without samples if the weight cannot be read."""
    costly = _costly_to_read(layers)
    count = samples_per_weight(len(costly) or len(layers))
    return {path: _sketch(layer, path, count, costly).to_text() for path, layer in layers.items()}


def require_base(layers: Mapping[str, FGGMLayer], config: FGGMConfig) -> None:
    """Raise ``BaseMismatchError``, or warn if ``check_base`` is False, unless the config's fingerprint fits."""
    expected = config.base_fingerprint or {}
    problem = base_difference(layers, expected)
    if problem is None:
        if expected and not any(_is_readable(layers[path]) for path in expected if path in layers):
            logger.warning("the base was not checked: its weights are sharded or not in memory yet")
        return
    problem = f"the adapter was made for another base: {problem}"
    if not config.check_base:
        warnings.warn(problem, stacklevel=2)
        return
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    raise BaseMismatchError(
        f"{problem}. Load the base model that its config names{base}, with the earlier deltas merged into it, or pass "
        "check_base=False."
    )


def base_difference(layers: Mapping[str, FGGMLayer], expected: Mapping[str, str]) -> str | None:
    """A description of the first module that differs from its expected sketch; None if all agree."""
    sketches = {path: sketch for path, sketch in sketches_from(expected).items() if path in layers}
    for path, sketch in sketches.items():
        shape = tuple(layers[path].weight_shape)
        if shape != sketch.shape:
            return f"{path} is {list(shape)} here, {list(sketch.shape)} in the adapter"
    costly = _costly_to_read(layers)
    quantized: dict[str, tuple[Tensor, Tensor]] = {}
    limit = 0.0
    for path, sketch in sketches.items():
        if sketch.samples is None:
            continue
        current = _sketch(layers[path], path, len(sketch.samples), costly)
        if current.samples is None:
            continue
        if sketch.quantized or current.quantized:
            quantized[path] = sketch.samples, current.samples
            limit = max(limit, _limit(layers[path], sketch))
        elif distance := exact_difference(sketch, current):
            return f"the weight of {path} differs by {distance:.2g} of its size"
    if quantized and relative_distance(list(quantized.values())) > limit:
        distances = {path: relative_distance([pair]) for path, pair in quantized.items()}
        path = next(path for path, distance in distances.items() if distance > limit)
        return f"the weight of {path} differs by {distances[path]:.2g} of its size; quantization explains {limit:g}"
    return None


@torch.no_grad()
def _sketch(layer: FGGMLayer, path: str, count: int, costly: set[str]) -> WeightSketch:
    weight = _readable_weight(layer, path in costly)
    if weight is None:
        return WeightSketch(layer.weight_shape)
    return sketch_weight(path, weight, count, layer.quantization_backend is not None)


def _readable_weight(layer: FGGMLayer, may_cost: bool) -> Tensor | None:
    """The weight ``[o, i]`` without merged deltas; None if it cannot be read, or only at a cost."""
    if not _is_readable(layer) or layer._replaced_bases or (_is_costly(layer) and not may_cost):
        return None
    if layer.quantization_backend is not None:
        return layer.weight_copy() if layer.quantization_backend.supports_merge else None
    weight = layer.get_base_weight().detach()
    if layer.merged_adapters:
        weight = weight.clone()
        for name in reversed(layer.merged_adapters):
            layer.restore_(weight, name)
    return layer.matrix(weight)


def _is_readable(layer: FGGMLayer) -> bool:
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    return weight is None or not (is_shard(weight) or (weight.is_meta and not is_offloaded(base)))


def _is_costly(layer: FGGMLayer) -> bool:
    return layer.quantization_backend is not None or is_offloaded(layer.get_base_layer())


def _costly_to_read(layers: Mapping[str, FGGMLayer]) -> set[str]:
    """A few of the modules whose weights are costly to read, spread over the model."""
    paths = [path for path, layer in layers.items() if _is_costly(layer)]
    count = min(MAX_COSTLY, len(paths))
    return {paths[position * (len(paths) - 1) // max(1, count - 1)] for position in range(count)}


def _limit(layer: FGGMLayer, expected: WeightSketch) -> float:
    """The sketch does not say which quantization it was taken with, so 4 bits are assumed."""
    backend = layer.quantization_backend
    limit = 0.0 if backend is None else MAX_DISTANCE.get(backend.backend_name, MAX_DISTANCE_ELSEWHERE)
    return max(limit, MAX_DISTANCE["bnb 4bit"] if expected.quantized else 0.0)
