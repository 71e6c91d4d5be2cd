"""Split-half agreement: would other data have chosen the same? Tells a mask from noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..tuner.support import Choice


def split_half_agreement(
    first: Mapping[str, Choice], second: Mapping[str, Choice], costs: Mapping[str, int]
) -> tuple[float | None, dict[str, float | None]]:
    """Overlap of two sets of supports, corrected for chance.

    ``(dice - chance) / (1 - chance)`` with Dice's overlap ``2 |A and B| / (|A| + |B|)`` and ``chance`` its
    expected value for random supports of the same sizes; units count by their parameters.

    Args:
        first: module path -> what one half of the samples chose.
        second: the same for the other half.
        costs: module path -> parameters that one unit holds.

    Returns:
        The agreement over all modules, and that of each: 1 is perfect, 0 is chance. None where it has
        no meaning, because nothing or everything is chosen.
    """
    both = expected = size = 0.0
    modules: dict[str, float | None] = {}
    for name, a in first.items():
        b = second[name]
        common = _intersection(a, b)
        chance = len(a.indices) * len(b.indices) / a.units
        mean = (len(a.indices) + len(b.indices)) / 2
        modules[name] = _corrected(common, chance, mean)
        both, expected, size = (
            both + common * costs[name],
            expected + chance * costs[name],
            size + mean * costs[name],
        )
    return _corrected(both, expected, size), modules


def _corrected(common: float, chance: float, size: float) -> float | None:
    return (common - chance) / (size - chance) if size > chance else None


def _intersection(a: Choice, b: Choice) -> int:
    chosen = torch.zeros(a.units, dtype=torch.bool)
    chosen[a.indices] = True
    return int(chosen[b.indices].sum())
