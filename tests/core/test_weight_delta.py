"""Sums and set operations of sparse deltas of one weight, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import KINDS, dense_delta, mask, relative_error, seeded, units

from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.weight_delta import WeightDelta, in_one_granularity, shared, united

NAMES = st.sampled_from(KINDS)
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


@st.composite
def deltas(draw, shape, kinds=NAMES):
    name = draw(kinds)
    chosen = sorted(draw(st.sets(st.integers(0, units(name, shape) - 1))))
    kind = granularity_from(name)
    values = torch.randn(kind.values_shape(shape, len(chosen)), generator=seeded(draw(st.integers(0, 9))))
    scale = draw(st.sampled_from([1.0, -0.5, 3.0]))
    return WeightDelta(kind, torch.tensor(chosen, dtype=torch.int32), values, scale)


@st.composite
def lists_of_deltas(draw):
    shape = draw(SHAPES)
    return shape, draw(st.lists(deltas(shape), min_size=1, max_size=4))


def dense(delta: WeightDelta, shape) -> torch.Tensor:
    return delta.scale * dense_delta(delta.granularity.name, shape, delta.indices, delta.values)


@settings(max_examples=150, deadline=None)
@given(lists_of_deltas())
def test_a_combination_is_the_dense_sum_on_the_union_of_the_supports(case):
    shape, several = case
    total = united(in_one_granularity(several, shape))
    assert relative_error(dense(total, shape), sum(dense(delta, shape) for delta in several)) < 1e-6
    union = torch.zeros(shape, dtype=torch.bool)
    for delta in several:
        union |= mask(delta.granularity.name, shape, delta.indices)
    assert torch.equal(mask(total.granularity.name, shape, total.indices), union)
    names = {delta.granularity.name for delta in several}
    assert total.granularity.name == (names.pop() if len(names) == 1 else "element")


@settings(max_examples=100, deadline=None)
@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), deltas(shape))))
def test_elements_and_entries_agree_with_the_dense_matrix(case):
    shape, delta = case
    expected = mask(delta.granularity.name, shape, delta.indices).flatten().nonzero().squeeze(1)
    assert torch.equal(delta.granularity.element_indices(delta.indices, shape), expected)
    assert torch.equal(dense(delta.as_elements(shape), shape), dense(delta, shape))


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_the_shared_support_is_the_intersection(a, b):
    first, second = (torch.tensor(sorted(numbers), dtype=torch.int32) for numbers in (a, b))
    in_a, in_b = shared(first, second)
    assert first[in_a].tolist() == second[in_b].tolist() == sorted(a & b)


def test_squares_and_restrictions_work_on_units(granularity, make_delta):
    shape = (6, 5)
    delta = make_delta(granularity, shape, 4, scale=-2.0)
    squares = dense(delta, shape).square()
    by_unit = {"row": squares.sum(1), "column": squares.sum(0), "element": squares.flatten()}[granularity]
    assert relative_error(delta.unit_squares(), by_unit[delta.indices.long()]) < 1e-6
    part = delta.restricted(torch.tensor([1, 3]))
    kept = mask(granularity, shape, delta.indices[[1, 3]])
    assert torch.equal(dense(part, shape), torch.where(kept, dense(delta, shape), 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sum_is_computed_in_at_least_float32(dtype, make_delta, granularity):
    delta = make_delta(granularity, (4, 3), 3, dtype=dtype)
    assert united([delta, delta]).values.dtype == torch.promote_types(dtype, torch.float32)
