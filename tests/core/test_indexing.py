"""Reading and overwriting parts of a matrix, against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fggm_peft.core.indexing import put_, put_rows_, select_columns

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def matrices(draw):
    """A matrix, possibly transposed or a part of a larger one."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    offset, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(DTYPES))
    storage = torch.arange(offset + rows * columns).to(dtype)
    return storage[offset:].view(rows, columns) if draw(st.booleans()) else storage[offset:].view(columns, rows).T


def chosen(draw, count: int) -> torch.Tensor:
    picked = draw(st.sets(st.integers(0, count - 1)))
    return torch.tensor(sorted(picked), dtype=draw(st.sampled_from([torch.int32, torch.int64])))


@given(st.data())
def test_put_rows(data):
    matrix = data.draw(matrices())
    rows = chosen(data.draw, len(matrix))
    entries = -torch.rand(len(rows), matrix.shape[1]).to(matrix.dtype)
    expected = matrix.clone()
    expected[rows.long()] = entries
    put_rows_(matrix, rows, entries)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)


@given(st.data())
def test_put_and_select_columns(data):
    matrix = data.draw(matrices())
    columns = chosen(data.draw, matrix.shape[1])
    torch.testing.assert_close(select_columns(matrix, columns), matrix[:, columns.long()], rtol=0, atol=0)
    entries = -torch.rand(len(columns), len(matrix)).to(matrix.dtype).T
    expected = matrix.clone()
    expected[:, columns.long()] = entries
    put_(matrix, columns, entries)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=0)


@given(st.data())
def test_put_entries(data):
    flat = data.draw(matrices()).flatten()
    indices = chosen(data.draw, len(flat))
    entries = -torch.rand(len(indices)).to(flat.dtype)
    expected = flat.clone()
    expected[indices.long()] = entries
    put_(flat, indices, entries)
    torch.testing.assert_close(flat, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_every_bit_pattern_is_moved_unchanged(dtype, value):
    """The functions see the memory as other dtypes, which must not convert it."""
    matrix, two = torch.zeros(4, 16, dtype=dtype), torch.tensor([1, 2])
    special = torch.full((4, 16), value, dtype=dtype)
    put_rows_(matrix, two, special[:2])
    put_(matrix, two, special[:, :2])
    assert torch.equal(matrix[1:3].view(torch.uint8), special[:2].view(torch.uint8))
    assert torch.equal(select_columns(matrix, two).view(torch.uint8), special[:, :2].contiguous().view(torch.uint8))
