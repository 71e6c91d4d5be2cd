"""Split-half agreement: would other data have selected the same units? Shows whether the selection is noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..tuner.support import Choice

MIN_SAMPLES = 32
MAX_SAMPLES = 1024
SUFFICIENT_AGREEMENT = 0.8
"""``num_samples="auto"`` stops here: they find 99 % of the score that more samples find (docs/choosing.md)."""


def split_half_agreement(
    first: Mapping[str, Choice], second: Mapping[str, Choice]
) -> tuple[float | None, dict[str, float | None]]:
    """Overlap of two sets of supports, corrected for chance.

    ``(dice - chance) / (1 - chance)`` with Dice's overlap ``2 |A and B| / (|A| + |B|)`` and ``chance`` its
    expected value for random supports of the same sizes. Units count by their entries.

    Args:
        first, second: module path -> choice, each from one half of the samples.

    Returns:
        The agreement over all modules, and of each module: 1 is perfect, 0 is chance. None if nothing or everything
        is selected.
    """
    common_total = chance_total = size_total = 0.0
    modules: dict[str, float | None] = {}
    for name, a in first.items():
        b = second[name]
        common = int(torch.isin(a.indices, b.indices).sum())
        chance = len(a.indices) * len(b.indices) / a.units
        size = (len(a.indices) + len(b.indices)) / 2
        modules[name] = _corrected(common, chance, size)
        common_total += common * a.unit_size
        chance_total += chance * a.unit_size
        size_total += size * a.unit_size
    return _corrected(common_total, chance_total, size_total), modules


def _corrected(common: float, chance: float, size: float) -> float | None:
    return (common - chance) / (size - chance) if size > chance else None
