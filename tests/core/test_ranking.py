"""The check for non-finite entries, for every position and dtype."""

from __future__ import annotations

import math

import pytest
import torch

from fggm_peft.core import ranking
from fggm_peft.core.ranking import all_finite

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (6, 8)])
def test_one_non_finite_entry_is_found(dtype, what, place):
    tensor = torch.randn(7, 9).to(dtype)
    assert all_finite(tensor)
    tensor[place] = what
    assert not all_finite(tensor)
    assert not all_finite(tensor.mT)


@DTYPES
def test_the_largest_numbers_of_a_dtype_are_finite(dtype):
    limits = torch.finfo(dtype)
    assert all_finite(torch.tensor([limits.min, 0.0, limits.max], dtype=torch.float64).to(dtype))


def test_an_empty_tensor_is_finite():
    assert all_finite(torch.empty(0, 4))


def test_a_parameter_that_requires_grad_can_be_checked():
    assert all_finite(torch.nn.Parameter(torch.ones(3)))


def test_sorting_a_small_weight_gives_the_result_of_the_histograms():
    scores = torch.randint(0, 6, (500,)).float()
    for count in (0, 1, 77, 250, 500, 600):
        assert torch.equal(ranking.top_indices(scores, count), ranking.take([scores], [torch.ones_like], count)[0])
