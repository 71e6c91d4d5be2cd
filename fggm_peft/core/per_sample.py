"""Squared per-sample gradients of a weight, from its layer's input and the gradient at its output.

The gradient of sample ``b`` with respect to a weight ``[o, i]`` is ``g[b].mT @ x[b]``; squared and
summed over samples it is the diagonal of the empirical Fisher information (FGGM, arXiv 2601.18261,
section 3; the same quantity as in EWC). None of the functions keeps a ``[b, o, i]`` tensor, and rows
and columns never form an ``[o, i]`` one when the Gram form is the cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowGradients(ABC):
    """What row scores need to know of the gradients of one batch with respect to one weight."""

    @abstractmethod
    def row_scores(self) -> Tensor:
        """Squared gradients summed over input features, ``[b, o]`` float32."""


class PerSampleGradients(RowGradients):
    """The gradients of one batch with respect to one weight, one for each sample."""

    shape: tuple[int, int]
    """``(o, i)`` of the weight."""

    @abstractmethod
    def column_scores(self) -> Tensor:
        """Squared gradients summed over output features, ``[b, i]`` float32."""

    @abstractmethod
    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        """Add each sample's squared gradient to ``scores[half[b]]``, ``[2, o * i]`` float32."""

    @abstractmethod
    def total(self, samples: Tensor) -> Tensor:
        """The sum of the gradients of the given samples, ``[b]`` booleans, with their signs: ``[o, i]`` float32."""


def gram_is_cheaper(positions: int, outputs: int, inputs: int, shared_by: int = 1) -> bool:
    """Whether the Gram form of row scores takes fewer operations than ``g.mT @ x`` does.

    That is ``c * t * (i / shared_by + o) < i * o`` if ``shared_by`` layers have the same input; ``c`` is the share of
    the Gram matrix that is formed, ``(n + 1) / 2n`` in ``n`` blocks. For column scores exchange inputs and outputs.
    """
    count = _block_count(positions)
    return (count + 1) * positions * (inputs / shared_by + outputs) < 2 * count * outputs * inputs


def _block_count(positions: int) -> int:
    # Fewer operations in more but smaller products; measured from 32 to 1024 positions, four pay from 128 on.
    return 4 if positions >= 128 else 1


class Block(NamedTuple):
    """Rows ``start`` to ``end`` of the lower triangle of ``x @ x.mT``, by blocks, as its quadratic form needs them.

    Args:
        products: ``[b, end - start, end]``; left of the diagonal block they are doubled, for the upper triangle.
    """

    start: int
    end: int
    products: Tensor


class GramMatrix:
    """``x @ x.mT`` of each sample, remembered for layers with one input (q, k, v; gate, up).

    Accumulated and returned in float32 at least.

    Args:
        shared_by: how many layers may ask for it; it is forgotten when they are done.
    """

    def __init__(self, shared_by: int = 1):
        self.shared_by = shared_by
        self._done = 0
        self._known: dict[tuple, tuple[Tensor, list[Block]]] = {}

    def __call__(self, x: Tensor) -> list[Block]:
        key = x.data_ptr(), x.shape, x.stride()  # x is kept alive, so that its memory is not another's
        if key not in self._known:
            self._known[key] = x, _gram_blocks(_widened(x))
        return self._known[key][1]

    def done(self) -> None:
        """One of the layers needs it no more."""
        self._done += 1
        if self._done >= self.shared_by:
            self._known.clear()


def _gram_blocks(x: Tensor) -> list[Block]:
    positions, count = x.shape[1], _block_count(x.shape[1])
    bounds = [positions * k // count for k in range(count + 1)]
    blocks = [Block(start, end, x[:, start:end] @ x[:, :end].mT) for start, end in pairwise(bounds)]
    for start, _, products in blocks:
        products[..., :start] *= 2
    return blocks


def _quadratic_form(vectors: Tensor, gram: list[Block]) -> Tensor:
    """``vectors[b, :, f] @ matrix[b] @ vectors[b, :, f]`` for every feature ``f``, ``[b, f]``."""
    vectors = vectors.to(gram[0].products.dtype)
    parts = [(block @ vectors[:, :end]).mul_(vectors[:, start:end]).sum(1) for start, end, block in gram]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two live tensors are the same memory in the same shape."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class LinearGradients(PerSampleGradients):
    """Gradients ``g[b].mT @ x[b]`` of a matrix that maps ``x`` ``[b, t, i]`` to ``[b, t, o]``.

    Args:
        x: layer input, ``[b, t, i]``.
        g: gradient of the summed log-likelihood at the layer's output, ``[b, t, o]``.
        gram: the Gram matrix of ``x``, if other layers have this input too.
    """

    def __init__(self, x: Tensor, g: Tensor, gram: GramMatrix | None = None):
        self.x, self.g, self.gram = x, g, gram or GramMatrix()
        self.shape = (g.shape[2], x.shape[2])

    def row_scores(self) -> Tensor:
        """FGGM equation 3. Exact: equals ``((g.mT @ x) ** 2).sum(-1)``."""
        return torch.cat([self._row_scores(x, g) for x, g in _by_length(self.x, self.g)])

    def _row_scores(self, x: Tensor, g: Tensor) -> Tensor:
        if gram_is_cheaper(x.shape[1], g.shape[2], x.shape[2], self.gram.shared_by):
            return _quadratic_form(g, self.gram(x))
        scores = _widened(g).new_empty(len(g), g.shape[2])
        for sample, rows, matrix in _matrices(x, g):
            scores[sample, rows] = matrix.square_().sum(1)
        return scores

    def column_scores(self) -> Tensor:
        """Exact: equals ``((g.mT @ x) ** 2).sum(-2)``."""
        return torch.cat([self._column_scores(x, g) for x, g in _by_length(self.x, self.g)])

    def _column_scores(self, x: Tensor, g: Tensor) -> Tensor:
        if gram_is_cheaper(x.shape[1], x.shape[2], g.shape[2]):
            return _quadratic_form(x, _gram_blocks(_widened(g)))
        scores = _widened(x).new_zeros(len(x), x.shape[2])
        for sample, _, matrix in _matrices(x, g):
            scores[sample] += matrix.square_().sum(0)
        return scores

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        table, which = scores.view(2, self.g.shape[2], self.x.shape[2]), half.tolist()
        first = 0
        for x, g in _by_length(self.x, self.g):
            for sample, rows, matrix in _matrices(x, g):
                table[which[first + sample], rows].addcmul_(matrix, matrix)
            first += len(x)

    def total(self, samples: Tensor) -> Tensor:
        x, g = (_widened(tensor[samples]).flatten(0, 1) for tensor in (self.x, self.g))
        return g.mT @ x


def _by_length(x: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The samples together; or one by one, without the positions at either end where ``g`` is 0, if those are many."""
    spans = _busy_spans(g)
    if spans is None:
        return [(x, g)]
    return [(x[b : b + 1, start:end], g[b : b + 1, start:end]) for b, (start, end) in enumerate(spans)]


def _busy_spans(g: Tensor) -> list[tuple[int, int]] | None:
    """From the first to behind the last position of each sample where ``g`` is not 0; None if that is nearly all.

    Padding is such, and in the last block of a decoder all that precedes the answer: they add nothing. On an
    accelerator many small products and asking for their sizes would cost more than is saved.
    """
    if g.device.type != "cpu":
        return None
    idle, few = g[..., 0] == 0, 0.1 * g[..., 0].numel()  # a look at one feature first
    if idle.sum() <= few:
        return None
    idle[idle.clone()] = ~g[idle].any(1)
    busy = (~idle).byte()
    starts = busy.argmax(1)
    ends = (busy.shape[1] - busy.flip(1).argmax(1)).where(~idle.all(1), 0)
    if idle.numel() - (ends - starts).sum() <= few:
        return None
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


class InputDigest(ABC):
    """What the row scores of the layers with one input need of it, in the place of that input ``[b, t, i]``."""

    @abstractmethod
    def row_scores(self, g: Tensor) -> Tensor:
        """As ``PerSampleGradients.row_scores``, ``[b, o]``, from ``g`` ``[b, t, o]``."""


class GramDigest(InputDigest):
    """``x @ x.mT`` of each sample: ``[t, t]`` in the place of ``[t, i]``, and the scores are exact."""

    def __init__(self, x: Tensor):
        self.blocks = _gram_blocks(_widened(x))

    def row_scores(self, g):
        spans = _busy_spans(g)
        if spans is None:
            return _quadratic_form(g, self.blocks)
        parts = [
            _quadratic_form(g[b : b + 1, start:end], self._between(b, start, end))
            for b, (start, end) in enumerate(spans)
        ]
        return torch.cat(parts)

    def _between(self, sample: int, start: int, end: int) -> list[Block]:
        """The blocks of one sample for its positions from ``start`` to ``end``."""
        found = []
        for block in self.blocks:
            first, last = max(start, block.start), max(start, min(end, block.end))
            rows = slice(first - block.start, max(first, last) - block.start)
            found.append(Block(first - start, last - start, block.products[sample : sample + 1, rows, start:last]))
        return found


class DigestedGradients(RowGradients):
    """Gradients of a layer of whose input only a digest is left."""

    def __init__(self, digest: InputDigest, g: Tensor):
        self.digest, self.g = digest, g

    def row_scores(self):
        return self.digest.row_scores(self.g)


_CHUNK_BYTES = 2**20


def _matrices(x: Tensor, g: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """The gradients as (sample, rows, some rows of it ``[rows, i]``), all samples of some rows before the next rows.

    On a CPU a piece and the sums it is added to stay in its cache: from ``t = 32`` to 512 this takes 0.4 to 1 times
    as long as whole matrices. With fewer rows than positions the product itself would be slower. A matrix is
    overwritten by the next.
    """
    x, g = _widened(x), _widened(g)
    outputs, inputs = g.shape[2], x.shape[2]
    at_once = outputs
    if g.device.type == "cpu":
        at_once = min(outputs, max(x.shape[1], _CHUNK_BYTES // (x.element_size() * inputs), 1))
    buffer = x.new_empty(at_once, inputs)
    for start in range(0, outputs, at_once):
        rows = slice(start, min(start + at_once, outputs))
        matrix = buffer[: rows.stop - start]
        for sample in range(len(x)):
            yield sample, rows, torch.mm(g[sample, :, rows].mT, x[sample], out=matrix)


class GroupedGradients(PerSampleGradients):
    """Gradients of a grouped convolution: every group is a small linear map of its own.

    Args:
        x: ``[b, t, groups, i]`` with ``i`` the inputs of one group.
        g: ``[b, t, groups, o / groups]``.
    """

    def __init__(self, x: Tensor, g: Tensor):
        matrices = torch.einsum("btqo,btqi->bqoi", _widened(g), _widened(x))
        self.matrices = matrices.flatten(1, 2)  # [b, o, i]
        self.shape = (self.matrices.shape[1], self.matrices.shape[2])

    def row_scores(self) -> Tensor:
        return self.matrices.square().sum(2)

    def column_scores(self) -> Tensor:
        return self.matrices.square().sum(1)

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        scores.index_add_(0, half, self.matrices.square().flatten(1).to(scores.dtype))

    def total(self, samples: Tensor) -> Tensor:
        return self.matrices[samples].sum(0)


class EmbeddingGradients(PerSampleGradients):
    """Gradients of a table ``[o, i]`` (``o`` tokens) that was read at ``tokens``.

    Args:
        tokens: ``[b, t]`` integers.
        g: gradient at the looked-up vectors, ``[b, t, i]``.
        rows: how many tokens the table has.
    """

    def __init__(self, tokens: Tensor, g: Tensor, rows: int):
        batch = torch.arange(len(tokens), device=tokens.device)[:, None]
        pairs, inverse = (batch * rows + tokens.long()).reshape(-1).unique(return_inverse=True)
        g = _widened(g).flatten(0, 1)
        # a token that occurs twice in a sample sums its gradients before they are squared
        self.sums = g.new_zeros(len(pairs), g.shape[-1]).index_add_(0, inverse, g)
        self.sample, self.token = pairs // rows, pairs % rows
        self.samples, self.shape = len(tokens), (rows, g.shape[-1])

    def row_scores(self) -> Tensor:
        scores = self.sums.new_zeros(self.samples, self.shape[0])
        return scores.index_put_((self.sample, self.token), self.sums.square().sum(1))

    def column_scores(self) -> Tensor:
        scores = self.sums.new_zeros(self.samples, self.shape[1])
        return scores.index_add_(0, self.sample, self.sums.square())

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        for which in (0, 1):
            chosen = half[self.sample] == which
            table = scores[which].view(self.shape)
            table.index_add_(0, self.token[chosen], self.sums[chosen].square().to(table.dtype))

    def total(self, samples: Tensor) -> Tensor:
        chosen = samples[self.sample]
        return self.sums.new_zeros(self.shape).index_add_(0, self.token[chosen], self.sums[chosen])


def unfold_convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """The patches that a 1-d, 2-d or 3-d convolution multiplies with its weight.

    Returns:
        ``[b, t, groups, i]``: ``t`` output positions, ``i`` the flattened inputs of one group.
    """
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    padding = layer._reversed_padding_repeated_twice  # "same" and tuples, already resolved
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, padding, mode=mode)
    sizes: Sequence[int] = layer.kernel_size
    for dim, (size, stride, dilation) in enumerate(zip(sizes, layer.stride, layer.dilation, strict=True), start=2):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    count = len(sizes)  # now [b, c, *positions, *kernel]
    x = x.unflatten(1, (layer.groups, -1)).movedim((1, 2), (count + 1, count + 2))
    return x.flatten(1, count).flatten(3)
