"""Reading and overwriting rows, columns and entries of a matrix, with the fastest operator for its dtype and device.

On a CPU, ``index_select`` and ``index_copy_`` move one entry at a time in many cases. Rows are moved as 16 bytes at a
time instead, and single entries by ``gather`` and ``scatter_``, which are two to three times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import is_recording


def select_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix[:, columns]`` for ``matrix`` ``[n, i]`` and sorted ``columns`` ``[k]``."""
    if matrix.device.type == "cpu" and matrix.element_size() == 2:
        return _bits(matrix).gather(1, columns.long().expand(len(matrix), -1)).view(matrix.dtype)
    return matrix.index_select(1, columns)


def put_rows_(matrix: Tensor, rows: Tensor, entries: Tensor) -> None:
    """``matrix[rows] = entries`` for ``matrix`` ``[o, i]`` and different ``rows`` ``[k]``."""
    if _has_wide_rows(matrix) and _has_wide_rows(entries):
        matrix, entries = matrix.view(torch.complex128), entries.view(torch.complex128)
    matrix.index_copy_(0, rows.long(), entries)


def put_(x: Tensor, indices: Tensor, entries: Tensor) -> None:
    """``x[..., indices] = entries`` for different ``indices`` ``[k]``: columns of a matrix, or entries of a vector."""
    if x.device.type == "cpu":
        _bits(x).scatter_(-1, indices.long().expand(*x.shape[:-1], -1), _bits(entries))
    else:
        x.index_copy_(-1, indices.long(), entries)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers if its numbers have 16 bits, which are then moved faster and without a change."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def _has_wide_rows(x: Tensor) -> bool:
    """Whether every row can be read as numbers of 16 bytes, which programs of torch.compile and torch.jit cannot do."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_recording():
        return False
    steps = (x.shape[1], x.stride(0), x.storage_offset())
    return x.stride(1) == 1 and all(step * x.element_size() % 16 == 0 for step in steps)
