"""Sparse products with PyTorch operators against dense products, on both sides of the density switch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, dense_delta, relative_error, seeded

from fggm_peft.core import sampled

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def by_pairs(product):
    """Adapts a product sampled at (row, column) pairs to the signature with flat indices."""
    return lambda x, g, indices: product(x, g, indices // x.shape[1], indices % x.shape[1])


ALGORITHMS = {
    "switch": sampled.sampled_product,
    "bag": by_pairs(sampled.bag_sampled_product),
    "chunks": sampled.dense_chunks,
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


def some(total, k, seed=0, dtype=torch.int32):
    return torch.randperm(total, generator=seeded(seed))[:k].sort().values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_algorithm
def test_sampled_entries_of_a_product_agree_with_dense(algorithm, dtype):
    o, i = 20, 30
    for k in (0, 1, 7, 30, 31, 60, 599, 600):  # 30 is 5 %, the switch of float32
        indices = some(o * i, k, seed=k)
        x, g = torch.randn(9, i).to(dtype), torch.randn(9, o).to(dtype)
        result = algorithm(x, g, indices)
        assert result.dtype == dtype
        dense = (g.double().T @ x.double()).view(-1)[indices.long()]
        assert relative_error(result, dense) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), o=st.integers(1, 15), i=st.integers(1, 15), n=st.integers(0, 6))
@each_algorithm
def test_any_shape_and_support_agrees_with_dense(algorithm, data, o, i, n):
    indices = some(
        o * i,
        data.draw(st.integers(0, o * i)),
        data.draw(st.integers(0, 99)),
        data.draw(st.sampled_from([torch.int32, torch.int64])),
    )
    x, g = torch.randn(n, i, dtype=torch.float64), torch.randn(n, o, dtype=torch.float64)
    dense = (g.T @ x).view(-1)[indices.long()]
    assert relative_error(algorithm(x, g, indices), dense) < TOLERANCE[torch.float64]


@each_algorithm
def test_strided_inputs_are_supported(algorithm):
    x, g = torch.randn(6, 5, dtype=torch.float64).T, torch.randn(4, 5, dtype=torch.float64).T
    for k in (1, 24):
        indices = some(24, k)
        dense = (g.T @ x).reshape(-1)[indices.long()]
        assert relative_error(algorithm(x, g, indices), dense) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_density_decides_which_algorithm_runs(dtype, monkeypatch):
    ran = []
    monkeypatch.setattr(sampled, "bag_sampled_product", lambda x, g, r, c: ran.append("bag"))
    monkeypatch.setattr(sampled, "dense_chunks", lambda x, g, i: ran.append("chunks"))
    limit = 50 if dtype in (torch.float32, torch.float64) else 10  # of 1000 entries
    for tokens in (1, 40):
        x, g = torch.randn(tokens, 50).to(dtype), torch.randn(tokens, 20).to(dtype)
        for k in (1, limit, limit + 1, 1000):
            sampled.sampled_product(x, g, some(1000, k))
    assert ran == ["bag", "bag", "chunks", "chunks"] * 2


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 100])
def test_the_chunk_size_does_not_change_the_result(rows_per_chunk, monkeypatch):
    x, g = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 13, dtype=torch.float64)
    monkeypatch.setattr(sampled, "_CHUNK_ENTRIES", rows_per_chunk * 6)
    # rows 4 to 6 stay empty
    indices = torch.cat([torch.arange(20), torch.arange(50, 78)])
    dense = (g.T @ x).view(-1)[indices]
    assert relative_error(sampled.dense_chunks(x, g, indices), dense) < TOLERANCE[torch.float64]


@each_algorithm
def test_int32_indices_can_address_the_last_row_of_their_largest_weight(algorithm):
    o, i = 32767, 65536  # the next row would end at 2**31
    x, g = torch.rand(1, i), torch.rand(1, o)
    indices = torch.tensor([5, (o - 1) * i + 7, o * i - 1], dtype=torch.int32)
    expected = torch.stack([x[0, 5] * g[0, 0], x[0, 7] * g[0, -1], x[0, -1] * g[0, -1]])
    torch.testing.assert_close(algorithm(x, g, indices), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_sparse_product_adds_the_product_with_the_sparse_matrix(dtype):
    o, i = 6, 11
    for k in (0, 1, 20, 66):
        indices = some(o * i, k, seed=k)
        values = torch.randn(k).to(dtype)
        x, y = torch.randn(4, i).to(dtype), torch.randn(4, o).to(dtype)
        expected = y.double() + 0.5 * x.double() @ dense_delta("element", (o, i), indices, values).T
        starts = torch.searchsorted(indices, torch.arange(o) * i)
        sampled.add_sparse_product_(y, x, starts, indices % i, values, 0.5)
        assert relative_error(y, expected) < TOLERANCE[dtype]


def test_add_sparse_product_does_not_change_outputs_without_entries():
    y = torch.randn(4, 6)
    before = y.clone()
    sampled.add_sparse_product_(
        y, torch.randn(4, 5), torch.tensor([0, 0, 0, 2, 2, 2]), torch.tensor([0, 4]), torch.ones(2)
    )
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[:, others], before[:, others])
    assert not torch.equal(y[:, 2], before[:, 2])
