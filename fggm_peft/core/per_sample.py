"""Squared per-sample gradients of a weight, from its layer's input and the gradient at its output.

The gradient of sample ``b`` with respect to a weight ``[o, i]`` is ``g[b].mT @ x[b]``. Its square, summed over samples,
is the diagonal of the empirical Fisher information (FGGM, arXiv 2601.18261, section 3; the same quantity as in EWC). No
function keeps a ``[b, o, i]`` tensor, and scores of rows and columns form no ``[o, i]`` tensor if the Gram form is
cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .wide import wide_product, widened


class PerSampleGradients(ABC):
    """The gradients of one batch with respect to one weight, one for each sample."""

    shape: tuple[int, int]  # (o, i)

    @abstractmethod
    def row_scores(self) -> Tensor:
        """Squared gradients summed over input features, ``[b, o]`` float32."""

    @abstractmethod
    def column_scores(self) -> Tensor:
        """Squared gradients summed over output features, ``[b, i]`` float32."""

    @abstractmethod
    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        """Add each sample's squared gradient to ``scores[half[b]]``, ``[2, o * i]`` float32."""


def gram_is_cheaper(positions: int, outputs: int, inputs: int, shared_by: int = 1) -> bool:
    """Whether the Gram form of row scores takes fewer operations than ``g.mT @ x``.

    The condition is ``c * t * (i / shared_by + o) < i * o`` if ``shared_by`` layers have the same input; ``c`` is the
    share of the Gram matrix that is formed, ``(n + 1) / 2n`` in ``n`` blocks. For column scores exchange inputs and
    outputs.
    """
    count = _block_count(positions)
    return (count + 1) * positions * (inputs / shared_by + outputs) < 2 * count * outputs * inputs


def _block_count(positions: int) -> int:
    # More blocks are fewer operations in smaller products. Measured from 32 to 1024 positions: four pay from 128 on.
    return 4 if positions >= 128 else 1


Block = tuple[int, int, Tensor]
"""Rows from a start to an end of the lower triangle of ``x @ x.mT``, doubled left of the diagonal block."""


class GramMatrix:
    """``x @ x.mT`` of each sample in float32 at least, cached for the ``shared_by`` layers with the same input.

    The cache is cleared when all of them have called ``done``.
    """

    def __init__(self, shared_by: int = 1):
        self.shared_by = shared_by
        self._done = 0
        self._last: tuple[Tensor, list[Block]] | None = None

    def __call__(self, x: Tensor) -> list[Block]:
        if self._last is None or not same_memory(self._last[0], x):
            self._last = x, _gram_blocks(x)  # x stays alive, so that its memory is not reused
        return self._last[1]

    def done(self) -> None:
        """One of the layers no longer needs it."""
        self._done += 1
        if self._done >= self.shared_by:
            self._last = None


def _gram_blocks(x: Tensor) -> list[Block]:
    positions, count = x.shape[1], 1 if x.is_cuda else _block_count(x.shape[1])  # starting a kernel takes time
    x = x if x.is_cuda else widened(x)
    bounds = [positions * k // count for k in range(count + 1)]
    blocks = [(start, end, wide_product(x[:, start:end], x[:, :end].mT)) for start, end in pairwise(bounds)]
    for start, _, products in blocks:
        products[..., :start] *= 2  # the quadratic form counts the upper triangle too
    return blocks


def _quadratic_form(vectors: Tensor, gram: list[Block]) -> Tensor:
    """``vectors[b, :, f] @ matrix[b] @ vectors[b, :, f]`` for every feature ``f``, ``[b, f]``."""
    vectors = vectors.to(gram[0][2].dtype)
    parts = [(block @ vectors[:, :end]).mul_(vectors[:, start:end]).sum(1) for start, end, block in gram]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are the same memory in the same shape."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class LinearGradients(PerSampleGradients):
    """Gradients ``g[b].mT @ x[b]`` of a matrix that maps ``x`` ``[b, t, i]`` to ``[b, t, o]``.

    ``g`` ``[b, t, o]`` is the gradient of the summed log-likelihood at the output. Layers with the same input share
    ``gram``.
    """

    def __init__(self, x: Tensor, g: Tensor, gram: GramMatrix | None = None):
        self.x, self.g, self.gram = x, g, gram or GramMatrix()
        self.shape = (g.shape[2], x.shape[2])

    def row_scores(self) -> Tensor:
        """FGGM equation 3. Exact: equals ``((g.mT @ x) ** 2).sum(-1)``."""
        x, g = self.x, self.g
        if gram_is_cheaper(x.shape[1], g.shape[2], x.shape[2], self.gram.shared_by):
            return _quadratic_form(g, self.gram(x))
        scores = widened(g).new_empty(len(g), g.shape[2])
        for sample, rows, matrix in _matrices(x, g):
            scores[sample, rows] = matrix.square_().sum(1)
        return scores

    def column_scores(self) -> Tensor:
        """Exact: equals ``((g.mT @ x) ** 2).sum(-2)``."""
        x, g = self.x, self.g
        if gram_is_cheaper(x.shape[1], x.shape[2], g.shape[2]):
            return _quadratic_form(x, _gram_blocks(g))
        scores = widened(x).new_zeros(len(x), x.shape[2])
        for sample, _, matrix in _matrices(x, g):
            scores[sample] += matrix.square_().sum(0)
        return scores

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        table, halves = scores.view(2, *self.shape), half.tolist()
        for sample, rows, matrix in _matrices(self.x, self.g):
            table[halves[sample], rows].addcmul_(matrix, matrix)


_CHUNK_BYTES = 2**20


def _matrices(x: Tensor, g: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """The gradients in pieces (sample, rows, these rows ``[rows, i]``), all samples of some rows before the next rows.

    On a CPU a piece stays in the cache with the sums that it is added to: for ``t`` from 32 to 512 this takes 0.4 to 1
    times as long as whole matrices. With fewer rows than positions the product itself would be slower. Each piece
    overwrites the one before.
    """
    if not x.is_cuda or x.dtype != g.dtype:
        x, g = widened(x), widened(g)
    outputs, inputs = g.shape[2], x.shape[2]
    at_once = outputs
    if g.device.type == "cpu":
        at_once = min(outputs, max(x.shape[1], _CHUNK_BYTES // (x.element_size() * inputs), 1))
    buffer = x.new_empty(at_once, inputs, dtype=torch.promote_types(x.dtype, torch.float32))
    for start in range(0, outputs, at_once):
        rows = slice(start, min(start + at_once, outputs))
        matrix = buffer[: rows.stop - start]
        for sample in range(len(x)):
            yield sample, rows, wide_product(g[sample, :, rows].mT, x[sample], out=matrix)


class MatrixGradients(PerSampleGradients):
    """Gradients that exist as matrices ``[b, o, i]``."""

    def __init__(self, matrices: Tensor):
        self.matrices = widened(matrices)
        self.shape = (matrices.shape[1], matrices.shape[2])

    def row_scores(self) -> Tensor:
        return self.matrices.square().sum(2)

    def column_scores(self) -> Tensor:
        return self.matrices.square().sum(1)

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        scores.index_add_(0, half.to(scores.device), self.matrices.square().flatten(1).to(scores.dtype))


class GroupedGradients(MatrixGradients):
    """Gradients of a grouped convolution: ``x`` ``[b, t, groups, i]`` and ``g`` ``[b, t, groups, o / groups]``."""

    def __init__(self, x: Tensor, g: Tensor):
        super().__init__(torch.einsum("btqo,btqi->bqoi", widened(g), widened(x)).flatten(1, 2))


class EmbeddingGradients(PerSampleGradients):
    """Gradients of a table of ``rows`` tokens, read at ``tokens`` ``[b, t]``; ``g`` ``[b, t, i]`` is at its output."""

    def __init__(self, tokens: Tensor, g: Tensor, rows: int):
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        pairs, inverse = (batch * rows + tokens.long()).reshape(-1).unique(return_inverse=True)
        g = widened(g).flatten(0, 1)
        # the gradients of a token that occurs twice in a sample are summed before they are squared
        self.sums = g.new_zeros(len(pairs), g.shape[-1]).index_add_(0, inverse, g)
        self.sample, self.token = pairs // rows, pairs % rows
        self.samples, self.shape = len(tokens), (rows, g.shape[-1])

    def row_scores(self) -> Tensor:
        scores = self.sums.new_zeros(self.samples, self.shape[0])
        return scores.index_put_((self.sample, self.token), self.sums.square().sum(1))

    def column_scores(self) -> Tensor:
        return self.sums.new_zeros(self.samples, self.shape[1]).index_add_(0, self.sample, self.sums.square())

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        for row in (0, 1):
            chosen = half.to(self.sample.device)[self.sample] == row
            table = scores[row].view(self.shape)
            table.index_add_(0, self.token[chosen], self.sums[chosen].square().to(table.dtype))


def unfold_convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """The patches ``[b, t, groups, i]`` that a 1-d, 2-d or 3-d convolution multiplies with its weight."""
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    padding = layer._reversed_padding_repeated_twice  # "same" and tuples are resolved in it
    x = F.pad(x, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    sizes: Sequence[int] = layer.kernel_size
    for dim, (size, stride, dilation) in enumerate(zip(sizes, layer.stride, layer.dilation, strict=True), start=2):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    count = len(sizes)  # now [b, c, *positions, *kernel]
    x = x.unflatten(1, (layer.groups, -1)).movedim((1, 2), (count + 1, count + 2))
    return x.flatten(1, count).flatten(3)
