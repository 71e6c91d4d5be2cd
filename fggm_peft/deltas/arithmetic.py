"""Arithmetic of deltas: weighted sums on the union of supports, differences, and the largest part of one.

Deltas of one granularity keep it; different ones are written as elements, one module at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.granularity import ELEMENTS, Granularity
from ..core.index_codec import index_dtype
from ..core.ranking import best_per_parameter
from ..core.weight_delta import WeightDelta, combined, restricted, unit_squares, united
from .delta import ModuleDelta, SparseDelta, made_delta
from .meta_base import Base

SCOPES = ("layer", "global")


def compose(sources: Sequence[Any], weights: Sequence[float] | None = None, base: Base | None = None) -> SparseDelta:
    """The weighted sum of deltas of one base model, on the union of their supports.

    The values are float32 (float64 if one of them is). Whole tensors (``modules_to_save``) must be the same in all.

    Args:
        sources: what ``SparseDelta.read`` takes.
        weights: one for each; 1 by default.
        base: see ``SparseDelta.read``.

    Raises:
        ValueError: they were made for different bases, or have whole tensors that differ, or bias entries that the
            granularity of the sum cannot hold.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if not sources or len(weights) != len(sources):
        raise ValueError(f"compose wants one delta or more and as many weights, got {len(sources)} and {len(weights)}")
    deltas = [SparseDelta.read(source, base) for source in sources]
    for delta in deltas[1:]:
        deltas[0].require_same_base(delta)
    others = _same_others(deltas)
    granularities = {delta.config.granularity for delta in deltas}
    granularity = granularities.pop() if len(granularities) == 1 else ELEMENTS
    with_bias = any(module.bias is not None for delta in deltas for module in delta.modules.values())
    if with_bias and not granularity.has_bias:
        raise ValueError("bias entries belong to chosen rows; deltas that have them combine with deltas of rows only")
    names = list(dict.fromkeys(name for delta in deltas for name in delta.modules))
    modules = {}
    for name in names:
        parts = [(d.modules[name], w) for d, w in zip(deltas, weights, strict=True) if name in d.modules]
        modules[name] = _sum(parts, granularity)
    made_by = "compose: weights " + ", ".join(f"{weight:g}" for weight in weights)
    return made_delta(deltas[0].config, granularity, modules, made_by, others)


def subtract(minuend: Any, subtrahend: Any, base: Base | None = None) -> SparseDelta:
    """``minuend - subtrahend`` on the union of their supports; otherwise as ``compose``."""
    return compose([minuend, subtrahend], [1.0, -1.0], base)


def prune(source: Any, density: float, scope: str = "layer", base: Base | None = None) -> SparseDelta:
    """The part of a delta that moves its weights most: the units with the largest mean square of their values.

    Args:
        source: what ``SparseDelta.read`` takes.
        density: share of the weights' entries that stay, in (0, 1].
        scope: "layer" keeps that share of every weight, "global" of all of them together.
        base: see ``SparseDelta.read``.

    Raises:
        ValueError: the density or the scope is no such thing, or nothing would be left.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be {' or '.join(map(repr, SCOPES))}, got {scope!r}")
    delta = SparseDelta.read(source, base)
    groups = [[name] for name in delta.modules] if scope == "layer" else [list(delta.modules)]
    modules = {}
    for names in groups:
        held = [delta.modules[name] for name in names]
        costs = [module.granularity.parameters_per_unit(module.shape) for module in held]
        budget = round(density * sum(module.shape[0] * module.shape[1] for module in held))
        scores = [unit_squares(module.scaled()) for module in held]
        for name, module, kept in zip(names, held, best_per_parameter(scores, costs, budget), strict=True):
            modules[name] = _restricted(module, kept)
    if not any(len(module.indices) for module in modules.values()):
        raise ValueError(f"nothing is left of the delta at a density of {density:g}")
    return made_delta(
        delta.config, delta.config.granularity, modules, f"prune: density {density:g}, {scope}", delta.others
    )


def _sum(parts: Sequence[tuple[ModuleDelta, float]], granularity: Granularity) -> ModuleDelta:
    shape = parts[0][0].shape
    deltas = [module.scaled(weight) for module, weight in parts]
    if granularity == ELEMENTS and any(d.granularity != ELEMENTS for d in deltas):
        # a module of one delta only must be of the granularity of the whole, too
        empty = torch.empty(0, dtype=index_dtype(shape[0] * shape[1]))
        deltas.append(WeightDelta(ELEMENTS, empty, torch.empty(0)))
    total = combined(deltas, shape)
    indices = total.indices.to(index_dtype(shape[0] * shape[1]))
    bias = None
    if any(module.bias is not None for module, _ in parts):
        # bias entries are elements of a vector that has the indices of the rows
        vectors = [(module.indices, module.bias, weight) for module, weight in parts if module.bias is not None]
        zero = (total.indices, torch.zeros(len(total.indices)), 1.0)
        elements = [WeightDelta(ELEMENTS, i, values, weight) for i, values, weight in [zero, *vectors]]
        bias = united(elements).values
    return ModuleDelta(total.granularity, shape, indices, total.values, bias)


def _restricted(module: ModuleDelta, kept: Tensor) -> ModuleDelta:
    part = restricted(module.scaled(), kept)
    bias = None if module.bias is None else module.bias[kept]
    return ModuleDelta(module.granularity, module.shape, part.indices, part.values, bias)


def _same_others(deltas: Sequence[SparseDelta]) -> dict[str, Tensor]:
    """The whole tensors, if all deltas have the same.

    Raises:
        ValueError: they differ: whole tensors are no differences that could be added.
    """
    first = deltas[0].others
    for delta in deltas[1:]:
        names = first.keys() | delta.others.keys()
        for name in sorted(names):
            if name not in first or name not in delta.others or not torch.equal(first[name], delta.others[name]):
                raise ValueError(
                    f"{name} is a whole tensor (modules_to_save, bias='all' or an embedding), not a delta, and is not "
                    "the same in all of these adapters, so that they have no sum"
                )
    return first
