"""Tiles of a product on tensor cores, and the product of gathered columns that consists of them."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Every choice takes the positions in the same steps, and at least 64 rows: Hopper uses another instruction below that.
# The first fits into 64 KiB of shared memory, also in float32.
TILES = [
    triton.Config({"BLOCK_ROWS": rows, "BLOCK_N": 64}, num_warps=warps, num_stages=stages)
    for rows, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 8, 3), (128, 8, 4))
]
TILE_COLUMNS = 128


def configs(choices: list[triton.Config]) -> list[triton.Config]:
    """The choices that the tuner tries; the interpreter has no device to measure on."""
    return choices[:1] if os.environ.get("TRITON_INTERPRET") == "1" else choices


@triton.jit
def tile_product(left, right, in_left, in_right, n, left_n, right_n, BLOCK_N: tl.constexpr):
    """``sum_n left[n] * right[n]`` in float32 for pointers ``left`` ``[rows]`` and ``right`` ``[columns]`` at n = 0.

    ``left_n`` and ``right_n`` are the strides from one position to the next.
    """
    position = tl.arange(0, BLOCK_N)
    a_place = left[:, None] + (position.to(tl.int64) * left_n)[None, :]
    b_place = right[None, :] + (position.to(tl.int64) * right_n)[:, None]
    product = tl.zeros([left.shape[0], right.shape[0]], dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        inside = position < n - start
        a = tl.load(a_place, mask=in_left[:, None] & inside[None, :], other=0)
        b = tl.load(b_place, mask=inside[:, None] & in_right[None, :], other=0)
        product = tl.dot(a, b, product, input_precision="ieee")
        a_place += BLOCK_N * left_n
        b_place += BLOCK_N * right_n
    return product


@triton.autotune(configs(TILES), key=["width"])
@triton.jit
def gathered_product_kernel(
    chosen, other, indices, result, n, count, width, chosen_n, chosen_unit, other_n, other_unit, result_k, result_unit,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``chosen[:, indices].mT @ other``, without a copy of the selected columns."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = entry < count, column < width
    unit = tl.load(indices + entry, mask=in_rows, other=0).to(tl.int64)
    left, right = chosen + unit * chosen_unit, other + column * other_unit
    product = tile_product(left, right, in_rows, in_columns, n, chosen_n, other_n, BLOCK_N)
    place = result + (entry * result_k)[:, None] + (column * result_unit)[None, :]
    tl.store(place, product.to(result.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def gathered_product_(result: Tensor, chosen: Tensor, other: Tensor, indices: Tensor) -> None:
    """``result[...] = chosen[:, indices].mT @ other``, for ``result`` ``[k, width]`` of any strides."""
    count, width = result.shape
    if count == 0 or width == 0:
        return

    def grid(meta):
        return triton.cdiv(count, meta["BLOCK_ROWS"]), triton.cdiv(width, TILE_COLUMNS)

    with torch.cuda.device_of(result):
        gathered_product_kernel[grid](
            chosen, other, indices.contiguous(), result, len(chosen), count, width,
            *chosen.stride(), *other.stride(), *result.stride(), BLOCK_COLUMNS=TILE_COLUMNS,
        )  # fmt: skip
