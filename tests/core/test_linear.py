"""Both forms of ``x @ (weight + deltas).mT`` against dense float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import KINDS, TOLERANCE, dense_delta, linear, relative_error, units

from fggm_peft.core.linear import (
    additive_linear,
    effective_linear,
    effective_matrix,
    effective_weight,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (8, 3), (1, 6), (6, 1), (16, 16)]
INPUTS = [(), (4,), (2, 3), (2, 1, 3), (0,)]  # leading dimensions of the input


def run_effective(x, weight, bias, deltas):
    return effective_linear(x, weight.clone, bias, deltas)


def run_additive(x, weight, bias, deltas):
    return additive_linear(F.linear(x, weight, bias), x, deltas)


FORMS = [run_effective, run_additive]


def counts(name, shape):
    total = units(name, shape)
    return sorted({0, 1, (total + 1) // 2, total})


def outputs_and_gradients(form, x, weight, bias, deltas, g):
    """Output and gradients of x, of the bias and of the values of each delta; all are new leaf tensors."""
    x = x.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    leaves = [leaf for leaf in (x, bias, *(d.values for d in deltas)) if leaf is not None]
    y = form(x, weight, bias, deltas)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype), allow_unused=True)]


def assert_like_dense(form, x, weight, bias, deltas):
    def dense(x, weight, bias, deltas):
        return linear(x, weight, bias, [(d.granularity.name, d.indices, d.values, d.scale) for d in deltas])

    g = torch.randn(*x.shape[:-1], weight.shape[0]).to(x.dtype)
    actual = outputs_and_gradients(form, x, weight, bias, deltas, g)
    expected = outputs_and_gradients(dense, x, weight, bias, deltas, g)
    leaves = [x, *([] if bias is None else [bias]), *(d.values for d in deltas)]
    assert actual[0].dtype == x.dtype
    for got, wanted, leaf in zip(actual[1:], expected[1:], leaves, strict=True):
        assert got.dtype == leaf.dtype
        assert got.shape == wanted.shape == leaf.shape
    for got, wanted in zip(actual, expected, strict=True):
        assert relative_error(got, wanted) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forward_and_all_gradients_agree_with_dense(form, dtype, granularity, make_delta):
    values_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, values_dtype)
            x, weight, bias = (torch.randn(size).to(dtype) for size in ((3, 4, shape[1]), shape, (shape[0],)))
            assert_like_dense(form, x, weight, bias, [delta])


@pytest.mark.parametrize("before", INPUTS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_input_may_have_any_number_of_dimensions(form, before, granularity, make_delta):
    delta = make_delta(granularity, (5, 7), 3)
    assert_like_dense(form, torch.randn(*before, 7), torch.randn(5, 7), torch.randn(5), [delta])


@pytest.mark.parametrize("form", FORMS)
def test_input_weight_and_output_gradient_may_be_strided(form, granularity, make_delta):
    delta = make_delta(granularity, (5, 7), 3, torch.float64)
    x = torch.randn(7, 4, 2, dtype=torch.float64).permute(2, 1, 0)  # not even viewable as [n, i]
    weight = torch.randn(7, 5, dtype=torch.float64).T
    assert_like_dense(form, x, weight, None, [delta])
    y = form(x.requires_grad_(), weight, None, [delta])
    g = torch.randn(5, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    gx, gv = torch.autograd.grad(y, [x, delta.values], g)
    other = linear(x, weight, None, [(granularity, delta.indices, delta.values, 1.0)])
    wanted_x, wanted_v = torch.autograd.grad(other, [x, delta.values], g)
    torch.testing.assert_close(gx, wanted_x)
    torch.testing.assert_close(gv, wanted_v)


@pytest.mark.parametrize("form", FORMS)
def test_several_deltas_of_any_granularity_add_up_with_their_scales(form, make_delta):
    shape = (8, 6)
    deltas = [
        make_delta(name, shape, 1 + position % 4, torch.float64, scale=scale, seed=position)
        for position, (name, scale) in enumerate([(n, s) for n in KINDS for s in (1.0, -0.5, 0.0)])
    ]
    x, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((5, 6), shape, (8,)))
    assert_like_dense(form, x, weight, bias, deltas)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("form", FORMS)
def test_random_shapes_and_supports_agree_with_dense(form, data, make_delta):
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    deltas = [
        make_delta(
            name,
            shape,
            data.draw(st.integers(0, units(name, shape))),
            torch.float64,
            scale=data.draw(st.sampled_from([1.0, 2.0, -0.25])),
            seed=data.draw(st.integers(0, 99)),
            index_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
        )
        for name in data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    ]
    x = torch.randn(data.draw(st.integers(0, 5)), shape[1], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    bias = torch.randn(shape[0], dtype=torch.float64) if data.draw(st.booleans()) else None
    assert_like_dense(form, x, weight, bias, deltas)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_effective_matrix_is_the_dense_sum_with_its_gradients(dtype, transposed, granularity, make_delta):
    shape = (5, 7)
    for k in counts(granularity, shape):
        deltas = [make_delta(granularity, shape, k, scale=0.5), make_delta(granularity, shape, 1, seed=1)]
        weight = torch.randn(shape).to(dtype)
        weight = weight.T.contiguous().T if transposed else weight
        matrix = effective_matrix(weight.clone, deltas)
        values = [d.values for d in deltas]
        dense = weight.double() + sum(d.scale * dense_delta(granularity, shape, d.indices, d.values) for d in deltas)
        g = torch.randn(shape).to(dtype)
        assert matrix.dtype == dtype
        assert relative_error(matrix, dense) < TOLERANCE[dtype]
        for actual, expected in zip(
            torch.autograd.grad(matrix, values, g), torch.autograd.grad(dense, values, g.double()), strict=True
        ):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_effective_form_equals_the_merged_weight_exactly(dtype, granularity, make_delta):
    deltas = [make_delta(granularity, (16, 12), 7, scale=0.01), make_delta(granularity, (16, 12), 5, seed=1)]
    x, weight, bias = torch.randn(6, 12).to(dtype), torch.randn(16, 12).to(dtype), torch.randn(16).to(dtype)
    with torch.no_grad():
        merged = effective_weight(weight.clone(), deltas)
    assert torch.equal(effective_linear(x, weight.clone, bias, deltas), F.linear(x, merged, bias))


def test_a_weight_of_another_dtype_is_converted_to_the_dtype_of_the_input(granularity, make_delta):
    delta = make_delta(granularity, (5, 7), 3)
    x, weight = torch.randn(4, 7).bfloat16(), torch.randn(5, 7)
    y = effective_linear(x, weight.clone, None, [delta])
    merged = effective_weight(weight.clone(), [delta]).detach()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x, merged.bfloat16()))


def test_the_effective_form_saves_no_tensor_as_large_as_the_weight(granularity, make_delta):
    delta = make_delta(granularity, (64, 48), 2)
    x, weight, kept = torch.randn(3, 48, requires_grad=True), torch.randn(64, 48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        effective_linear(x, weight.clone, torch.randn(64), [delta]).sum()
    assert kept, "the input and the values are saved"
    assert max(kept) < weight.numel() / 10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k, kept", [(0, 0), (7, 7), (16, 16), (17, 48), (48, 48)])
def test_few_columns_save_only_their_own_inputs(k, kept, form, make_delta):
    """Layers such as key and value share one input: beyond a third of it, separate copies would need more memory."""
    delta = make_delta("column", (64, 48), k)
    x, sizes = torch.randn(50, 48, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.shape) and t, lambda t: t):
        form(x, torch.randn(64, 48), None, [delta])
    assert sum(shape[1] for shape in sizes.values() if shape[0] == 50) == kept


def test_backward_reads_the_weight_only_if_the_input_requires_grad(make_delta):
    calls = []

    def source():
        calls.append(1)
        return torch.ones(5, 7)

    for requires_grad, expected in ((False, 1), (True, 2)):
        calls.clear()
        delta = make_delta("row", (5, 7), 2)
        effective_linear(torch.ones(4, 7, requires_grad=requires_grad), source, None, [delta]).sum().backward()
        assert len(calls) == expected
        assert delta.values.grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_a_frozen_delta_is_added_but_gets_no_gradient_and_saves_no_input(form, granularity, make_delta):
    delta = make_delta(granularity, (64, 48), 3)
    delta.values.requires_grad_(False)
    x, weight, kept = torch.randn(50, 48, requires_grad=True), torch.randn(64, 48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = form(x, weight, None, [delta])
    expected = linear(x, weight, None, [(granularity, delta.indices, delta.values, 1.0)])
    assert relative_error(y, expected) < TOLERANCE[torch.float32]
    assert x.data_ptr() not in kept
    y.sum().backward()
    assert delta.values.grad is None
    assert relative_error(x.grad, torch.autograd.grad(expected.sum(), x)[0]) < TOLERANCE[torch.float32]


def test_the_additive_form_does_not_change_the_base_output(granularity, make_delta):
    delta = make_delta(granularity, (5, 7), 3)
    base = torch.randn(4, 5)
    before = base.clone()
    additive_linear(base, torch.randn(4, 7), [delta])
    assert torch.equal(base, before)


def test_second_derivatives_raise_an_error(granularity, make_delta):
    delta = make_delta(granularity, (5, 7), 3, torch.float64)
    weight = torch.randn(5, 7, dtype=torch.float64)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    for y in (
        run_effective(x, weight, None, [delta]),
        run_additive(x, weight, None, [delta]),
        effective_matrix(weight.clone, [delta]),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), delta.values, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
