"""Regret: the share of the best possible score that a selection misses because its samples are few.

Units near the threshold have nearly equal scores, so two halves of the samples may select different units without any
loss. Regret asks what the difference costs, on samples that did not make the selection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from ..core.ranking import best_per_parameter, checked, top_indices
from ..tuner.config import FGGMConfig
from ..tuner.support import by_policy, choose_supports
from ..tuner.target import Targets

MIN_SAMPLES = 8
MAX_SAMPLES = 1024
HalfScores = dict[str, tuple[float, float]]
"""Module path -> (score of the selected units, score of the best units)."""


def split_half_scores(targets: Targets, config: FGGMConfig, scores: Callable[[str, int], Tensor]) -> HalfScores:
    """The scores that a selection from one half of the samples has on the other half, and the highest possible ones.

    A selection is compared with the best one of its size: the same number of units of a weight or, with global scope,
    of parameters. Each half selects once, and the sums are added.

    Args:
        scores: (module path, half) -> ``[units]``, from one half of the samples, 0 or 1.
    """
    selected, best = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0.0)
    for half in (0, 1):

        def of_half(path: str, half: int = half) -> Tensor:
            return scores(path, half)

        choices = choose_supports(targets, config, of_half)
        for policy, group in by_policy(targets, config):
            others = [checked(part.scores(partial(of_half, half=1 - half))) for part in group]
            selectable = [part.first.granularity.selectable(other) for part, other in zip(group, others, strict=True)]
            own = [choices[part.first.path].indices for part in group]
            costs = [part.unit_size for part in group]
            if policy.scope == "layer":
                highest = [top_indices(other, len(indices)) for other, indices in zip(selectable, own, strict=True)]
            else:
                size = sum(len(indices) * cost for indices, cost in zip(own, costs, strict=True))
                highest = best_per_parameter(selectable, costs, size)
            for part, other, indices, top in zip(group, others, own, highest, strict=True):
                for path in part.targets:
                    selected[path] += float(other[indices].double().sum())
                    best[path] += float(other[top].double().sum())
    return {path: (selected[path], best[path]) for path in targets}


def regret_of(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The estimated regret of the selection from all samples, in [0, 1/4]; None if every score is 0.

    ``1 - selected / best`` compares two halves. The half that measures overestimates its own best selection as much as
    the other half misses, so half of the difference is the regret of a selection from one half. A regret is quadratic
    in the noise of the scores, so a selection from twice as many samples has half of it.
    """
    selected, best = map(sum, zip(*pairs, strict=True))
    return max(0.0, 1 - selected / best) / 4 if best else None
