"""What may move in one weight: whole rows, whole columns or single elements.

A *support* is a sorted vector of unit indices; together with the *values* on it it is a sparse
delta of a weight ``[o, i]``. Everything that depends on the kind of unit is a method here, so a new
granularity is one class and one line in the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor

from . import kernels
from .per_sample import PerSampleGradients, RowGradients
from .registry import Registry
from .sampled import add_sparse_product_, sampled_product, starts_of

Shape = tuple[int, int]  # (o, i)


def sum_rounded_once(entries: Tensor, values: Tensor, scale: float) -> Tensor:
    """``entries + scale * values`` in the dtype of ``entries``: added in float32 at least."""
    wide = torch.promote_types(torch.promote_types(entries.dtype, values.dtype), torch.float32)
    return torch.add(entries.to(wide), values.to(wide), alpha=scale).to(entries.dtype)


def _add_matrix_product_(y: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``y += scale * a @ b``, rounded once also where ``a`` and ``b`` are wider than ``y``."""
    if a.dtype == y.dtype:
        y.addmm_(a, b, alpha=scale)
    else:
        y.add_(a @ b, alpha=scale)


class Granularity(ABC):
    """One kind of unit that may be chosen, and the arithmetic of deltas made of such units."""

    name: ClassVar[str]
    unit_dim: ClassVar[int]  # the dimension of the values that counts units
    weight_dim: ClassVar[int | None] = None  # the dimension of a weight that units are slices along, if they are
    index_codecs: ClassVar[tuple[str, ...]] = ("plain",)  # what a file may hold the indices in
    keeps_part: ClassVar[bool] = False  # of its inputs a step keeps a part where few units are chosen
    takes_digest: ClassVar[bool] = False  # its scores can do without the layer's input, see ``InputDigest``

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """How many units a weight of this shape has."""

    @abstractmethod
    def parameters_per_unit(self, shape: Shape) -> int:
        """How many weight entries one unit holds."""

    @abstractmethod
    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        """Shape of the values of ``k`` chosen units, in the weight's own orientation."""

    @abstractmethod
    def element_indices(self, indices: Tensor, shape: Shape) -> Tensor:
        """Flat indices ``o * in + i`` of every chosen entry, int64, in the order of the flattened values: sorted."""

    @abstractmethod
    def reduce(self, matrix: Tensor) -> Tensor:
        """Sum a score of every entry, ``[o, i]``, to a score of every unit, ``[units]``."""

    @abstractmethod
    def accumulate_(self, scores: Tensor, gradients: PerSampleGradients, half: Tensor) -> None:
        """Add the squared per-sample gradients of one batch to the running scores.

        Args:
            scores: ``[2, units]`` float32, changed in place: one running sum for each half.
            gradients: the batch's gradients with respect to one weight.
            half: ``[b]``, 0 or 1: the running sum that each sample goes to.
        """

    @abstractmethod
    def gather(self, weight: Tensor, indices: Tensor) -> Tensor:
        """The chosen entries of ``weight`` ``[o, i]``, shaped like the values."""

    @abstractmethod
    def put_(self, weight: Tensor, indices: Tensor, entries: Tensor) -> None:
        """Write ``entries`` over the chosen entries of ``weight`` ``[o, i]``."""

    def kept_input(self, x: Tensor, indices: Tensor) -> Tensor:
        """What ``value_gradient`` will need of ``x`` ``[n, i]``: all of it, or a part that takes less memory."""
        return x

    @abstractmethod
    def value_gradient(self, kept: Tensor, g: Tensor, indices: Tensor) -> Tensor:
        """The chosen entries of ``g.mT @ x``, from what was kept of ``x`` ``[n, i]`` and from ``g`` ``[n, o]``."""

    @abstractmethod
    def add_product_(self, y: Tensor, x: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``y += scale * x @ delta.mT`` for ``y`` ``[n, o]`` and ``x`` ``[n, i]`` in the dtype of the values."""

    @abstractmethod
    def add_input_gradient_(self, gx: Tensor, g: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``gx += scale * g @ delta`` for ``gx`` ``[n, i]`` and ``g`` ``[n, o]`` in the dtype of the values."""

    @abstractmethod
    def delta_rows(self, rows: Tensor, indices: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """The given rows of the delta, dense ``[n, i]``; differentiable in ``values``."""

    def pieces(
        self, weight: Tensor, indices: Tensor, tensors: Sequence[Tensor], size: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """A delta in parts of about ``size`` entries, each with the part of the weight that it is a delta of.

        Args:
            weight: ``[o, i]``.
            indices: ``[k]``.
            tensors: each ``values_shape(shape, k)``, not empty.
            size: a part has more where a single unit, or a line of columns, is more.

        Returns:
            Of each part a view of the weight, the indices into that, and its part of every tensor.
        """
        step = max(1, size * len(tensors[0]) // tensors[0].numel())
        yield from zip(*self._parts(weight, indices, step), *(t.split(step) for t in tensors), strict=False)

    def _parts(self, weight: Tensor, indices: Tensor, step: int) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Views of the weight, and indices into each, for ``step`` lines of the values at a time."""
        return repeat(weight), indices.split(step)

    def added(self, weight: Tensor, indices: Tensor, values: Tensor, scale: float) -> Tensor:
        """The chosen entries after the delta is added: in float32 at least, rounded once."""
        return sum_rounded_once(self.gather(weight, indices), values, scale)

    def add_(self, weight: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``weight += scale * delta`` in place, rounding each touched entry once."""
        self.put_(weight, indices, self.added(weight, indices, values, scale))


class Rows(Granularity):
    """Output features: row ``o`` of the weight (FGGM's choice). Values are ``[k, i]``."""

    name = "row"
    unit_dim = 0
    weight_dim = 0
    takes_digest = True

    def units(self, shape):
        return shape[0]

    def parameters_per_unit(self, shape):
        return shape[1]

    def values_shape(self, shape, k):
        return (k, shape[1])

    def element_indices(self, indices, shape):
        return (indices.long()[:, None] * shape[1] + torch.arange(shape[1], device=indices.device)).flatten()

    def reduce(self, matrix):
        return matrix.sum(1)

    def accumulate_(self, scores, gradients: RowGradients, half):
        scores.index_add_(0, half, gradients.row_scores().to(scores.dtype))

    def gather(self, weight, indices):
        return weight.index_select(0, indices)

    def put_(self, weight, indices, entries):
        weight.index_copy_(0, indices.long(), entries)

    def value_gradient(self, kept, g, indices):
        if kernels.gathers(g, kept, indices):
            return kernels.gathered_product(g, kept, indices)
        return g.index_select(1, indices).mT @ kept

    def add_product_(self, y, x, indices, values, scale=1.0):
        y.index_add_(1, indices, (x @ values.mT).to(y.dtype), alpha=scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        _add_matrix_product_(gx, g.index_select(1, indices), values, scale)

    def delta_rows(self, rows, indices, values, shape):
        if indices.numel() == 0:
            return values.new_zeros(len(rows), shape[1])
        position = torch.searchsorted(indices, rows.to(indices.dtype)).clamp_(max=len(indices) - 1)
        chosen = indices[position] == rows
        return values[position] * chosen[:, None].to(values.dtype)


class Columns(Granularity):
    """Input features: column ``i`` of the weight. Values are ``[o, k]``."""

    name = "column"
    unit_dim = 1
    weight_dim = 1
    keeps_part = True

    def units(self, shape):
        return shape[1]

    def parameters_per_unit(self, shape):
        return shape[0]

    def values_shape(self, shape, k):
        return (shape[0], k)

    def element_indices(self, indices, shape):
        return (torch.arange(shape[0], device=indices.device)[:, None] * shape[1] + indices.long()).flatten()

    def reduce(self, matrix):
        return matrix.sum(0)

    def accumulate_(self, scores, gradients, half):
        scores.index_add_(0, half, gradients.column_scores().to(scores.dtype))

    def gather(self, weight, indices):
        return weight.index_select(1, indices)

    def put_(self, weight, indices, entries):
        weight.index_copy_(1, indices.long(), entries)

    def _parts(self, weight, indices, step):
        return weight.split(step), repeat(indices)

    def kept_input(self, x, indices):
        # the query, key and value layers share one input, of which each would keep a part of its own
        return x.index_select(1, indices) if 3 * indices.numel() <= x.shape[1] else x

    def value_gradient(self, kept, g, indices):
        if kept.shape[1] == indices.numel():
            return g.mT @ kept
        if kernels.gathers(kept, g, indices):
            return kernels.gathered_product(kept, g, indices, True)
        return g.mT @ kept.index_select(1, indices)

    def add_product_(self, y, x, indices, values, scale=1.0):
        _add_matrix_product_(y, x.index_select(1, indices), values.mT, scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        gx.index_add_(1, indices, (g @ values).to(gx.dtype), alpha=scale)

    def delta_rows(self, rows, indices, values, shape):
        zeros = values.new_zeros(len(rows), shape[1])
        return zeros.index_copy(1, indices.long(), values[rows])


class Elements(Granularity):
    """Single entries, as flat indices ``o * in + i``. Values are ``[k]``."""

    name = "element"
    unit_dim = 0
    index_codecs = ("plain", "golomb_rice")

    def units(self, shape):
        return shape[0] * shape[1]

    def parameters_per_unit(self, shape):
        return 1

    def values_shape(self, shape, k):
        return (k,)

    def element_indices(self, indices, shape):
        return indices.long()

    def reduce(self, matrix):
        return matrix.reshape(-1)

    def accumulate_(self, scores, gradients, half):
        gradients.add_element_scores_(scores, half)

    # A transposed base weight (Conv1D) cannot be viewed flat, hence (row, column) pairs below.
    def gather(self, weight, indices):
        if weight.is_contiguous():
            return weight.view(-1).index_select(0, indices)
        return weight[indices // weight.shape[1], indices % weight.shape[1]]

    def put_(self, weight, indices, entries):
        if weight.is_contiguous():
            weight.view(-1).index_copy_(0, indices.long(), entries)
        else:
            width = weight.shape[1]
            weight.index_put_((indices // width, indices % width), entries)

    def add_(self, weight, indices, values, scale=1.0):
        if kernels.adds(weight, values):
            kernels.add_elements_(weight, indices, values, scale)
        else:
            super().add_(weight, indices, values, scale)

    def value_gradient(self, kept, g, indices):
        return sampled_product(kept, g, indices)

    def add_product_(self, y, x, indices, values, scale=1.0):
        starts = starts_of(indices, torch.arange(y.shape[1], device=y.device) * x.shape[1])
        add_sparse_product_(y, x, starts, indices % x.shape[1], values, scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        rows, columns = indices // gx.shape[1], indices % gx.shape[1]
        columns, order = columns.sort(stable=True)
        starts = starts_of(columns, torch.arange(gx.shape[1], device=gx.device))
        add_sparse_product_(gx, g, starts, rows[order], values[order], scale)

    def delta_rows(self, rows, indices, values, shape):
        if torch.compiler.is_exporting():  # no size in an exported program may depend on data
            return values.new_zeros(shape[0] * shape[1]).index_copy(0, indices.long(), values).view(shape)[rows]
        unique, inverse = rows.unique(return_inverse=True)
        first = torch.searchsorted(indices, (unique * shape[1]).to(indices.dtype))
        last = torch.searchsorted(indices, ((unique + 1) * shape[1]).to(indices.dtype))
        count = last - first
        line = torch.repeat_interleave(torch.arange(len(unique), device=rows.device), count)
        start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
        entry = start + torch.arange(len(start), device=rows.device)
        flat = line * shape[1] + indices[entry].long() % shape[1]
        dense = values.new_zeros(len(unique) * shape[1]).index_copy(0, flat, values[entry])
        return dense.view(len(unique), shape[1])[inverse]


GRANULARITIES: Registry[Granularity] = Registry("granularity")
for _granularity in (Rows(), Columns(), Elements()):
    GRANULARITIES.register(_granularity.name, _granularity)
