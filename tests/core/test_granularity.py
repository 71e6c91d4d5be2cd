"""Every method of every granularity agrees with the dense delta."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, dense_delta, mask, relative_error, unit_scores, units

from fggm_peft.core.granularity import GRANULARITIES, granularity_from
from fggm_peft.core.registry import Registry

SHAPES = [(1, 1), (5, 7), (8, 3), (1, 9), (6, 1)]
INDEX_DTYPES = [torch.int32, torch.int64]


def counts(name, shape):
    """No unit, one unit, about half and all units."""
    total = units(name, shape)
    return sorted({0, 1, (total + 1) // 2, total})


def weights(shape, dtype=torch.float32):
    """The same matrix, contiguous and transposed as in a Conv1D."""
    weight = torch.randn(shape).to(dtype)
    return [weight, weight.T.contiguous().T]


@pytest.mark.parametrize("shape", SHAPES)
def test_units_times_parameters_per_unit_is_the_whole_weight(granularity, shape):
    kind = granularity_from(granularity)
    assert kind.name == granularity
    assert kind.units(shape) == units(granularity, shape)
    assert kind.units(shape) * kind.parameters_per_unit(shape) == shape[0] * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_contain_one_number_for_each_entry_of_the_support(granularity, shape, make_delta):
    kind = granularity_from(granularity)
    for k in counts(granularity, shape):
        delta = make_delta(granularity, shape, k)
        expected = kind.values_shape(shape, k)
        assert delta.values.numel() == int(mask(granularity, shape, delta.indices).sum())
        assert expected[kind.unit_dim] == k


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_sums_the_scores_of_the_entries_of_a_unit(granularity, shape):
    matrix = torch.rand(shape, dtype=torch.float64)
    for scores in (matrix, matrix.T.contiguous().T):
        torch.testing.assert_close(granularity_from(granularity).reduce(scores), unit_scores(granularity, matrix))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_reads_the_selected_entries_in_the_order_of_the_values(granularity, shape, index_dtype, make_delta):
    for weight in weights(shape):
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, index_dtype=index_dtype)
            entries = delta.granularity.gather(weight, delta.indices)
            assert entries.shape == delta.values.shape
            assert torch.equal(entries.flatten(), weight[mask(granularity, shape, delta.indices)])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_put_writes_only_the_selected_entries(granularity, shape, index_dtype, make_delta):
    for weight in weights(shape):
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, index_dtype=index_dtype)
            chosen = mask(granularity, shape, delta.indices)
            written = weight.clone()
            delta.granularity.put_(written, delta.indices, delta.values.detach())
            assert torch.equal(written[~chosen], weight[~chosen])
            assert torch.equal(written[chosen], delta.values.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adding_rounds_each_changed_entry_once_and_keeps_the_others(granularity, dtype, make_delta):
    shape = (9, 11)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for weight in weights(shape, dtype):
        delta = make_delta(granularity, shape, 4, scale=0.5)
        chosen = mask(granularity, shape, delta.indices)
        full = dense_delta(granularity, shape, delta.indices, delta.values.detach()).to(wide)
        once = (weight.to(wide) + 0.5 * full).to(dtype)
        added = delta.granularity.added(weight, delta.indices, delta.values.detach(), delta.scale)
        assert torch.equal(added.flatten(), once[chosen])
        changed = weight.clone()
        delta.granularity.add_(changed, delta.indices, delta.values.detach(), delta.scale)
        assert torch.equal(changed, torch.where(chosen, once, weight))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_products_and_their_gradients_agree_with_the_dense_delta(granularity, index_dtype, make_delta):
    for shape in SHAPES:
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, torch.float64, index_dtype=index_dtype)
            values = delta.values.detach()
            dense = dense_delta(granularity, shape, delta.indices, values)
            x, g = torch.randn(4, shape[1], dtype=torch.float64), torch.randn(4, shape[0], dtype=torch.float64)
            y, gx = torch.randn_like(g), torch.randn_like(x)
            expected_y, expected_gx = y - 0.5 * x @ dense.T, gx - 0.5 * g @ dense
            delta.granularity.add_product_(y, x, delta.indices, values, -0.5)
            delta.granularity.add_input_gradient_(gx, g, delta.indices, values, -0.5)
            gradient = delta.granularity.value_gradient(x, g, delta.indices)
            assert relative_error(y, expected_y) < TOLERANCE[torch.float64]
            assert relative_error(gx, expected_gx) < TOLERANCE[torch.float64]
            assert gradient.shape == values.shape
            chosen = (g.T @ x)[mask(granularity, shape, delta.indices)]
            assert relative_error(gradient.flatten(), chosen) < TOLERANCE[torch.float64]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(list(GRANULARITIES)), shape=st.sampled_from(SHAPES))
def test_delta_rows_and_their_gradients_agree_with_the_dense_delta(data, name, shape, make_delta):
    k = data.draw(st.integers(0, units(name, shape)))
    index_dtype = data.draw(st.sampled_from(INDEX_DTYPES))
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=8)), dtype=torch.int64)
    delta = make_delta(name, shape, k, torch.float64, seed=k, index_dtype=index_dtype)
    rows = delta.granularity.delta_rows(tokens, delta.indices, delta.values, shape)
    expected = dense_delta(name, shape, delta.indices, delta.values)[tokens]
    assert torch.equal(rows, expected)
    if rows.requires_grad:
        g = torch.randn_like(rows)
        (gradient,) = torch.autograd.grad(rows, delta.values, g)
        (wanted,) = torch.autograd.grad(expected, delta.values, g)
        torch.testing.assert_close(gradient, wanted)


def test_delta_rows_give_gradients_to_the_values_of_the_read_rows(granularity, make_delta):
    total = units(granularity, (5, 4))
    delta = make_delta(granularity, (5, 4), total)
    tokens = torch.tensor([2, 0, 2])
    delta.granularity.delta_rows(tokens, delta.indices, delta.values, (5, 4)).sum().backward()
    counted = dense_delta(granularity, (5, 4), delta.indices, delta.values.grad)
    assert torch.equal(counted, torch.tensor([1.0, 0, 2, 0, 0]).double()[:, None].expand(5, 4))


def test_an_unknown_name_lists_the_known_names_and_suggests_the_closest():
    with pytest.raises(ValueError, match=r"unknown granularity 'rows'; known are 'row'.*Did you mean 'row'"):
        granularity_from("rows")


def test_a_name_can_be_registered_only_once():
    registry = Registry("fruit")
    registry.register("pear")(1)
    with pytest.raises(ValueError, match="already a fruit named 'pear'"):
        registry.register("pear")(2)
    assert (registry["pear"], list(registry), "pear" in registry) == (1, ["pear"], True)
