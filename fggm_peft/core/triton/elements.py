"""Kernels for single elements: adding them to a weight, and entries of a product of two matrices.

Indices are unique, so there are no atomic operations and results are deterministic. The tuner's choices do not change
the order of sums, so that processes with different choices get the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE_COLUMNS, TILES, configs, tile_product

_ADDED_ENTRIES = 1024
_DOT_POSITIONS = 256  # a warp reads 512 bytes of one feature at a time


@triton.jit
def add_elements_kernel(
    weight, indices, values, scale, count, width, stride_o, stride_i, CONTIGUOUS: tl.constexpr, BLOCK: tl.constexpr
):
    """``weight[indices] += scale * values``, in float32 and rounded once."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    flat = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    place = weight + (flat if CONTIGUOUS else flat // width * stride_o + flat % width * stride_i)
    before = tl.load(place, mask=inside, other=0).to(tl.float32)
    value = tl.load(values + entry, mask=inside, other=0).to(tl.float32)
    after = tl.fma(value, tl.zeros_like(value) + scale, before)
    tl.store(place, after.to(weight.dtype.element_ty), mask=inside)


def add_elements_(weight: Tensor, indices: Tensor, values: Tensor, scale: float) -> None:
    """``weight.view(-1)[indices] += scale * values`` for ``weight`` ``[o, i]`` of any strides, in place."""
    count = indices.numel()
    if count == 0:
        return
    grid = (triton.cdiv(count, _ADDED_ENTRIES),)
    with torch.cuda.device_of(weight):
        add_elements_kernel[grid](
            weight,
            indices.contiguous(),
            values.contiguous(),
            float(scale),
            count,
            weight.shape[1],
            *weight.stride(),
            CONTIGUOUS=weight.is_contiguous(),
            BLOCK=_ADDED_ENTRIES,
        )


# the same number of warps, so that they are laid out alike along the positions and sums keep their order
DOTS = [triton.Config({"BLOCK_K": entries}, num_warps=4) for entries in (16, 32, 64)]


@triton.autotune(configs(DOTS), key=[])
@triton.jit
def sampled_dots_kernel(
    left, right, indices, result, n, count, width, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Entries of ``left @ right.mT`` for ``left`` ``[o, n]`` and ``right`` ``[i, n]``, both contiguous."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = entry < count
    flat = tl.load(indices + entry, mask=inside, other=0).to(tl.int64)
    left_row = left + (flat // width * n)[:, None]
    right_row = right + (flat % width * n)[:, None]
    total = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for start in range(0, n, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        mask = inside[:, None] & (position < n)[None, :]
        a = tl.load(left_row + position[None, :], mask=mask, other=0).to(tl.float32)
        b = tl.load(right_row + position[None, :], mask=mask, other=0).to(tl.float32)
        total = tl.fma(a, b, total)  # explicit, because versions of Triton differ in whether they fuse
    tl.store(result + entry, tl.sum(total, 1).to(result.dtype.element_ty), mask=inside)


def sampled_dots(x: Tensor, g: Tensor, indices: Tensor) -> Tensor:
    """The entries ``indices`` of ``g.mT @ x`` by one dot product each: the cost grows with their number."""
    count = indices.numel()
    result = x.new_empty(count)
    if count == 0:
        return result
    left, right = g.mT.contiguous(), x.mT.contiguous()  # the positions of a feature are adjacent
    with torch.cuda.device_of(x):
        sampled_dots_kernel[lambda meta: (triton.cdiv(count, meta["BLOCK_K"]),)](
            left, right, indices.contiguous(), result, len(x), count, x.shape[1], BLOCK_N=_DOT_POSITIONS
        )
    return result


@triton.autotune(configs(TILES), key=["width"])
@triton.jit
def sampled_tiles_kernel(
    g, x, indices, starts, result, n, height, width, g_n, g_o, x_n, x_i,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Entries of ``g.mT @ x``, picked from each tile of the product while it is in registers.

    ``starts[row * tiles + tile]`` is the number of indices before the tile's first column in that row.
    """
    tiles = tl.cdiv(width, BLOCK_COLUMNS)
    tile = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows, in_columns = rows < height, columns < width
    start = starts + rows.to(tl.int64) * tiles + tile
    first = tl.load(start, mask=in_rows, other=0).to(tl.int64)
    last = tl.load(start + 1, mask=in_rows, other=0).to(tl.int64)
    entry = first[:, None] + tl.arange(0, BLOCK_COLUMNS)[None, :]
    chosen = entry < last[:, None]
    if tl.max(last - first) > 0:
        left, right = g + rows.to(tl.int64) * g_o, x + columns.to(tl.int64) * x_i
        product = tile_product(left, right, in_rows, in_columns, n, g_n, x_n, BLOCK_N)
        flat = tl.load(indices + entry, mask=chosen, other=0).to(tl.int64)
        column = flat - (rows.to(tl.int64) * width)[:, None] - tile * BLOCK_COLUMNS
        picked = tl.gather(product, tl.where(chosen, column, 0).to(tl.int32), 1)
        tl.store(result + entry, picked.to(result.dtype.element_ty), mask=chosen)


def sampled_tiles(x: Tensor, g: Tensor, indices: Tensor) -> Tensor:
    """The entries ``indices`` (sorted) of ``g.mT @ x`` at the cost of the whole product, which is never in memory."""
    result = x.new_empty(indices.numel())
    if indices.numel() == 0:
        return result
    indices, (height, width) = indices.contiguous(), (g.shape[1], x.shape[1])
    tiles = triton.cdiv(width, TILE_COLUMNS)
    first_columns = torch.arange(0, width, TILE_COLUMNS, device=x.device)
    edges = torch.arange(height, device=x.device)[:, None] * width + first_columns
    starts = x.new_empty(height * tiles + 1, dtype=torch.int64)
    torch.searchsorted(indices, edges.flatten().to(indices.dtype), out=starts[:-1])
    starts[-1] = indices.numel()
    with torch.cuda.device_of(x):
        sampled_tiles_kernel[lambda meta: (triton.cdiv(height, meta["BLOCK_ROWS"]), tiles)](
            g, x, indices, starts, result, len(x), height, width, *g.stride(), *x.stride(), BLOCK_COLUMNS=TILE_COLUMNS
        )
    return result
