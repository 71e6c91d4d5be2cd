"""Squared per-sample gradients of a weight, from its layer's input and the gradient at its output.

The gradient of sample ``b`` with respect to a weight ``[o, i]`` is ``g[b].mT @ x[b]``; squared and
summed over samples it is the diagonal of the empirical Fisher information (FGGM, arXiv 2601.18261,
section 3; the same quantity as in EWC). None of the functions keeps a ``[b, o, i]`` tensor, and rows
and columns never form an ``[o, i]`` one when the Gram form is the cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerSampleGradients(ABC):
    """The gradients of one batch with respect to one weight, one for each sample."""

    @abstractmethod
    def row_scores(self) -> Tensor:
        """Squared gradients summed over input features, ``[b, o]`` float32."""

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

    That is ``t * (i / shared_by + o) < i * o`` if ``shared_by`` layers have the same input. For column
    scores exchange inputs and outputs.
    """
    return positions * (inputs / shared_by + outputs) < outputs * inputs


class GramMatrix:
    """``x @ x.mT`` of each sample, ``[b, t, t]``, remembered for layers with one input (q, k, v; gate, up).

    Accumulated and returned in float32 at least.

    Args:
        shared_by: how many layers will ask for it; it is forgotten when they have.
    """

    def __init__(self, shared_by: int = 1):
        self.shared_by = shared_by
        self._last: tuple[Tensor, Tensor] | None = None
        self._asked = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or not same_memory(self._last[0], x):
            wide = _widened(x)
            self._last = x, wide @ wide.mT
        gram = self._last[1]
        self._asked += 1
        if self._asked >= self.shared_by:
            self._last = None
        return gram


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

    def row_scores(self) -> Tensor:
        """FGGM equation 3. Exact: equals ``((g.mT @ x) ** 2).sum(-1)``."""
        if gram_is_cheaper(self.x.shape[1], self.g.shape[2], self.x.shape[2], self.gram.shared_by):
            return _quadratic_form(self.g, self.gram(self.x))
        return torch.stack([matrix.square().sum(1) for matrix in self._matrices()])

    def column_scores(self) -> Tensor:
        """Exact: equals ``((g.mT @ x) ** 2).sum(-2)``."""
        if gram_is_cheaper(self.x.shape[1], self.x.shape[2], self.g.shape[2]):
            return _quadratic_form(self.x, GramMatrix()(self.g))
        return torch.stack([matrix.square().sum(0) for matrix in self._matrices()])

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        for matrix, which in zip(self._matrices(), half.tolist(), strict=True):
            flat = matrix.view(-1)
            scores[which].addcmul_(flat, flat)

    def total(self, samples: Tensor) -> Tensor:
        x, g = (_widened(tensor[samples]).flatten(0, 1) for tensor in (self.x, self.g))
        return g.mT @ x

    def _matrices(self):
        for x, g in zip(self.x, self.g, strict=True):
            yield _widened(g).mT @ _widened(x)


def _quadratic_form(vectors: Tensor, gram: Tensor) -> Tensor:
    """``vectors[b, :, f] @ gram[b] @ vectors[b, :, f]`` for every feature ``f``, ``[b, f]``."""
    vectors = vectors.to(gram.dtype)
    return (gram @ vectors).mul_(vectors).sum(1)


class GroupedGradients(PerSampleGradients):
    """Gradients of a grouped convolution: every group is a small linear map of its own.

    Args:
        x: ``[b, t, groups, i]`` with ``i`` the inputs of one group.
        g: ``[b, t, groups, o / groups]``.
    """

    def __init__(self, x: Tensor, g: Tensor):
        matrices = torch.einsum("btqo,btqi->bqoi", _widened(g), _widened(x))
        self.matrices = matrices.flatten(1, 2)  # [b, o, i]

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
        self.shape = (len(tokens), rows, g.shape[-1])

    def row_scores(self) -> Tensor:
        scores = self.sums.new_zeros(self.shape[:2])
        return scores.index_put_((self.sample, self.token), self.sums.square().sum(1))

    def column_scores(self) -> Tensor:
        scores = self.sums.new_zeros(self.shape[0], self.shape[2])
        return scores.index_add_(0, self.sample, self.sums.square())

    def add_element_scores_(self, scores: Tensor, half: Tensor) -> None:
        for which in (0, 1):
            chosen = half[self.sample] == which
            table = scores[which].view(self.shape[1:])
            table.index_add_(0, self.token[chosen], self.sums[chosen].square().to(table.dtype))

    def total(self, samples: Tensor) -> Tensor:
        chosen = samples[self.sample]
        return self.sums.new_zeros(self.shape[1:]).index_add_(0, self.token[chosen], self.sums[chosen])


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
