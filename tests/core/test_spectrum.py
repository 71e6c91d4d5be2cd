"""A spectrum agrees with sorting, up to the width of its bins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sorted_spectrum

from fggm_peft.core.errors import NonFiniteScoreError
from fggm_peft.core.spectrum import SHARES, spectrum


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 99), st.sampled_from([0.3, 1.0, 8.0]), st.sampled_from([0.0, 0.5]))
def test_the_spectrum_contains_the_sorted_scores_over_their_mean(units, seed, power, zeros):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(units, generator=generator) ** power * (torch.rand(units, generator=generator) >= zeros)
    for found, exact in zip(spectrum(scores), sorted_spectrum(scores), strict=True):
        assert 0.9915 * exact <= found <= 1.0006 * exact


def test_zero_and_negative_zero_scores_are_zero():
    assert spectrum(torch.zeros(5)) == [0.0] * len(SHARES)
    assert spectrum(torch.tensor([-0.0, 1.0, 0.0]))[-1] == 0.0


def test_the_shares_begin_with_the_best_and_end_with_the_worst_unit():
    assert len(SHARES) == 65 and (SHARES[0], SHARES[-1]) == (0.0, 1.0) and list(SHARES) == sorted(SHARES)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_invalid_scores_are_rejected(value):
    with pytest.raises(NonFiniteScoreError):
        spectrum(torch.tensor([1.0, value]))
