"""Arithmetic of deltas: weighted sums on the union of supports, and pruning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.index_codec import index_dtype
from ..core.ranking import best_per_parameter
from ..core.registry import require_one_of
from ..tuner.several.weighted import combine, common_granularity
from .delta import ModuleDelta, SparseDelta, new_delta


def compose(sources: Sequence[Any], weights: Sequence[float] | None = None) -> SparseDelta:
    """The weighted sum of deltas of one base model, on the union of their supports.

    Deltas of one granularity keep it. Deltas of different granularities are converted to single elements.
    The values are float32 (float64 if a delta has float64 values). Whole tensors (``modules_to_save``) must be equal
    in all deltas.

    Args:
        sources: what ``SparseDelta.read`` accepts.
        weights: one for each source; 1 by default.

    Raises:
        ValueError: the deltas have different bases, or different whole tensors.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if not sources or len(weights) != len(sources):
        raise ValueError(f"compose needs one weight for each delta, got {len(weights)} for {len(sources)} deltas")
    deltas = [SparseDelta.read(source) for source in sources]
    for delta in deltas[1:]:
        deltas[0].require_same_base(delta)
    others = _common_others(deltas)
    granularity = common_granularity([delta.granularity for delta in deltas])
    modules = {}
    for path in dict.fromkeys(path for delta in deltas for path in delta.modules):
        terms = [(d.modules[path], w) for d, w in zip(deltas, weights, strict=True) if path in d.modules]
        shape = terms[0][0].shape
        unit = granularity.of_weight(path, shape)
        total = combine([module for module, _ in terms], [weight for _, weight in terms], unit, shape)
        indices = total.indices.to(index_dtype(shape[0] * shape[1]))
        modules[path] = ModuleDelta(unit, indices, total.values, shape=shape)
    made_by = "compose: weights " + ", ".join(f"{weight:g}" for weight in weights)
    return new_delta(deltas[0].config, granularity, modules, made_by, others)


def prune(source: Any, density: float, scope: str = "layer") -> SparseDelta:
    """The units of a delta that change the weights most: those with the largest mean square of their values.

    Each weight has units of its own here, also if they are parts of attention heads.

    Args:
        source: what ``SparseDelta.read`` accepts.
        density: share of the weights' entries that stays, in (0, 1].
        scope: "layer" applies the density to each weight, "global" to all together.

    Raises:
        ValueError: an argument is not legal, or no unit would be left.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    require_one_of("scope", scope, ("layer", "global"))
    delta = SparseDelta.read(source)
    groups = [[path] for path in delta.modules] if scope == "layer" else [list(delta.modules)]
    modules: dict[str, ModuleDelta] = {}
    for paths in groups:
        group = [delta.modules[path] for path in paths]
        costs = [module.granularity.parameters_per_unit(module.shape) for module in group]
        budget = round(density * sum(module.shape[0] * module.shape[1] for module in group))
        scores = [module.unit_squares() for module in group]
        best = best_per_parameter(scores, costs, budget)
        modules |= {path: module.restricted(keep) for path, module, keep in zip(paths, group, best, strict=True)}
    if not any(len(module.indices) for module in modules.values()):
        raise ValueError(f"no unit of the delta is left at a density of {density:g}")
    return new_delta(
        delta.config, delta.granularity, modules, f"prune: density {density:g}, scope {scope}", delta.others
    )


def _common_others(deltas: Sequence[SparseDelta]) -> dict[str, Tensor]:
    """The whole tensors, which are no differences and must be equal in all deltas."""
    first = deltas[0].others
    for other in (delta.others for delta in deltas[1:]):
        for name in sorted(first.keys() | other.keys()):
            if name not in first or name not in other or not torch.equal(first[name], other[name]):
                raise ValueError(
                    f"{name} is a whole tensor (modules_to_save, bias='all' or an embedding) and differs between these "
                    "adapters, so they cannot be added"
                )
    return first
