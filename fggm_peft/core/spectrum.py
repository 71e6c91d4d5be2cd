"""How the scores of one weight fall from the best to the worst, in 65 numbers, however many units there are."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranking import checked

SHARES = (0.0, *(2.0 ** (step / 4 - 63 / 4) for step in range(64)))
"""Where a spectrum is known: at the best unit, then at shares from 2e-5 to 1, four to each halving, because what a
threshold takes is at the top."""

_LOW_BITS = 16
_BINS = 1 << 15
_CHUNK = 1 << 22


def spectrum(scores: Tensor) -> list[float]:
    """The score that each of ``SHARES`` of the units reach, over the mean score; zeros if every score is 0.

    Taken from a histogram over bit patterns, so that nothing is sorted: at most 0.8 % below the exact value.

    Args:
        scores: ``[units]``, finite and not negative.

    Returns:
        As many numbers as ``SHARES``, falling, rounded to four digits.
    """
    scores = checked(scores)
    histogram = torch.zeros(_BINS, dtype=torch.int64)
    for chunk in scores.split(_CHUNK):
        histogram += torch.bincount(chunk.view(torch.int32).clamp(min=0) >> _LOW_BITS, minlength=_BINS)
    from_top = histogram.flip(0).cumsum(0)
    ranks = (torch.tensor(SHARES, dtype=torch.float64) * len(scores)).ceil().clamp(1, len(scores)).long()
    bins = _BINS - 1 - torch.searchsorted(from_top, ranks)
    values = (bins << _LOW_BITS).to(torch.int32).view(torch.float32).double()
    mean = float(scores.double().mean())
    return [float(f"{value:.4g}") for value in (values / mean if mean else values * 0).tolist()]
