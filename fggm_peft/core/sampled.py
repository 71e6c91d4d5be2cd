"""Sparse products by operators of PyTorch, without an ``[o, i]`` matrix.

``embedding_bag`` with per-sample weights is a CSR product, and the gradient of its weights is the sampled product of
two dense matrices. PyTorch's own sparse CSR tensors are 4 to 11 times slower under autograd.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import has_data
from .wide import gradient_product

# above these densities the dense product in chunks of rows is faster on a CPU (benchmarks/suite)
_SAMPLED_MAX_DENSITY = {torch.float32: 0.05, torch.float64: 0.05}
_SAMPLED_MAX_DENSITY_16_BIT = 0.01
_CHUNK_ENTRIES = 1 << 20  # 4 MiB of float32; smaller chunks cost 5-10 % more
_CHUNK_ENTRIES_OF_A_GPU = 1 << 26  # 256 MiB: nearly always the whole product, which needs no synchronization


def starts_of(indices: Tensor, bounds: Tensor) -> Tensor:
    """How many of the sorted ``indices`` are below each of ``bounds``, in their own dtype, int32 or int64."""
    return torch.searchsorted(indices, bounds.to(indices.dtype), out_int32=indices.dtype == torch.int32)


def add_sparse_product_(
    y: Tensor, x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, scale: float = 1.0
) -> None:
    """``y[:, row] += scale * x[:, columns[k]] * values[k]`` for every ``k`` from ``starts[row]`` to the next start.

    ``y`` is ``[n, o]``, ``x`` ``[n, i]``, ``starts`` ``[o]``; ``columns`` and ``values`` are ``[k]``.
    """
    if columns.numel() == 0:
        return
    bags = F.embedding_bag(columns, x.mT.contiguous(), starts, per_sample_weights=values, mode="sum")
    y.add_(bags.mT, alpha=scale)


def sampled_product(x: Tensor, g: Tensor, indices: Tensor) -> Tensor:
    """The entries ``indices`` (flat, ``o * in + i``, sorted) of ``g.mT @ x``, ``[k]``.

    ``x`` is ``[n, i]`` and ``g`` is ``[n, o]``. The algorithm depends on the device, the dtype and the density.
    """
    density = indices.numel() / (g.shape[1] * x.shape[1])
    if x.is_cuda or density > _SAMPLED_MAX_DENSITY.get(x.dtype, _SAMPLED_MAX_DENSITY_16_BIT):
        return dense_chunks(x, g, indices)
    return bag_sampled_product(x, g, indices // x.shape[1], indices % x.shape[1])


def bag_sampled_product(x: Tensor, g: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``sum_n g[n, rows[k]] * x[n, columns[k]]`` by the gradient of ``embedding_bag``."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g.mT.contiguous(),
        x.mT.contiguous(),
        columns.long(),
        starts_of(rows, torch.arange(g.shape[1], device=g.device)).long(),
        rows.long(),
        0,  # mode "sum"
    )


def _bounds(indices: Tensor, edges: Tensor) -> list[int]:
    """How many of the sorted indices are below each edge; without data (a dry run), as if they were evenly spread."""
    if not has_data(indices):
        count = max(1, len(edges) - 1)
        return [indices.numel() * part // count for part in range(len(edges))]
    return torch.searchsorted(indices, edges.to(indices.dtype)).tolist()


def dense_chunks(x: Tensor, g: Tensor, indices: Tensor) -> Tensor:
    """The same from dense products of as many rows at a time as fit into a chunk."""
    width = x.shape[1]
    step = max(1, (_CHUNK_ENTRIES_OF_A_GPU if x.is_cuda else _CHUNK_ENTRIES) // width)
    if step >= g.shape[1]:
        return gradient_product(g.mT, x).view(-1).index_select(0, indices)
    parts = []
    # the last edge stays below 2**31 if the indices are int32
    edges = torch.arange(0, g.shape[1] + step, step, device=indices.device).clamp_(max=g.shape[1]) * width
    for chunk, (first, last) in enumerate(itertools.pairwise(_bounds(indices, edges))):
        if first < last:
            start = chunk * step
            product = gradient_product(g[:, start : start + step].mT, x)
            parts.append(product.view(-1).index_select(0, indices[first:last] - start * width))
    return torch.cat(parts) if parts else x.new_empty(0)
