"""Granularities: the kinds of unit that are selected and trained as one, such as rows, columns or elements.

A *support* is a sorted vector of unit indices. A support and the *values* on it are a sparse delta of a weight
``[o, i]``. Everything that depends on the kind of unit is a method here, so a new granularity is one class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .covariance import Covariance
from .harm_decay import Decay, DiagonalDecay, SpectralDecay
from .indexing import put_, put_rows_, select_columns
from .per_sample import PerSampleGradients
from .registry import Registry
from .sampled import add_sparse_product_, sampled_product, starts_of
from .tracing import is_recording
from .wide import gradient_product, widened

Shape = tuple[int, int]  # (o, i)


def sum_rounded_once(entries: Tensor, values: Tensor, scale: float) -> Tensor:
    """``entries + scale * values`` in the dtype of ``entries``: added in float32 at least."""
    values = widened(values)  # mixed dtypes are added in the wider one
    if is_recording() or (torch.is_grad_enabled() and values.requires_grad):
        return torch.add(entries, values, alpha=scale).to(entries.dtype)
    return torch.add(entries, values, alpha=scale, out=torch.empty_like(entries))  # one kernel on a GPU


def _add_matrix_product_(y: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``y += scale * a @ b``, rounded once even if ``a`` and ``b`` are wider than ``y``."""
    if a.dtype == y.dtype:
        y.addmm_(a, b, alpha=scale)
    else:
        y.add_(a @ b, alpha=scale)


@dataclass(frozen=True)
class UnitKind(ABC):
    """What one unit of an adapter is: a part of one weight (``Granularity``), or of several weights (``Heads``).

    Subclasses are frozen dataclasses; their fields are the arguments of the granularity.
    """

    name: ClassVar[str]  # set by the registry
    weight_dim: ClassVar[int | None] = None  # units are slices of the weight along this dimension; None: they are not

    def of_model(self, model: nn.Module, path: str) -> UnitKind:
        """The units of a model, as the module at ``path`` shows them; by default they do not depend on the model."""
        return self

    @abstractmethod
    def of_weight(self, path: str, shape: Shape) -> Granularity:
        """The parts of the units in the weight of one module; ``ValueError`` if it has none."""

    def group_of(self, path: str) -> str:
        """A name that modules share if they select the same units; by default each module selects its own."""
        return path

    @property
    def is_slice(self) -> bool:
        """Whether a unit is a row or a column: ``k`` units are then a delta of rank ``k``."""
        return self.weight_dim is not None

    def to_dict(self) -> str | dict[str, Any]:
        """The JSON form: the name, or a dict of the name and the arguments; ``granularity_from`` reads it."""
        arguments = asdict(self)
        return {"granularity": self.name, **arguments} if arguments else self.name

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in asdict(self).items())
        return f"{self.name}({arguments})" if arguments else self.name

    @property
    def plural(self) -> str:
        """The units in messages, such as "rows" or "row_blocks(size=64)"."""
        return str(self).replace(self.name, f"{self.name.removesuffix('s')}s", 1)


@dataclass(frozen=True)
class Granularity(UnitKind):
    """One kind of unit of a weight, and the arithmetic of deltas that consist of such units.

    Only the abstract methods are required. The other methods have slow, correct defaults, which treat the entries of
    the units as elements.
    """

    unit_dim: ClassVar[int] = 0  # the dimension of the values that counts units
    compresses_indices: ClassVar[bool] = False  # files contain encoded indices, see ``index_codec``
    stores_partial_input: ClassVar[bool] = False  # see ``stored_input``

    @abstractmethod
    def units(self, shape: Shape) -> int:
        """Number of units of a weight."""

    @abstractmethod
    def parameters_per_unit(self, shape: Shape) -> int:
        """Number of weight entries of one unit."""

    @abstractmethod
    def values_shape(self, shape: Shape, k: int) -> tuple[int, ...]:
        """Shape of the values of ``k`` units."""

    @abstractmethod
    def element_indices(self, indices: Tensor, shape: Shape) -> Tensor:
        """Flat indices ``o * in + i`` of the entries of the given units, int64, in the order of the flattened values.

        Rows, columns and elements return them sorted; other granularities need not.
        """

    @abstractmethod
    def reduce(self, matrix: Tensor) -> Tensor:
        """Sum a score of every entry, ``[o, i]``, to a score of every unit, ``[units]``."""

    def supports(self, shape: Shape) -> bool:
        """Whether a weight of this shape can be divided into units."""
        return True

    def most_units(self, shape: Shape) -> int:
        """The largest number of units of a weight that can be selected together."""
        return self.units(shape)

    def selectable(self, scores: Tensor) -> Tensor:
        """``scores`` ``[units]`` with 0, so that no threshold selects them, for units that better ones exclude."""
        return scores

    def of_weight(self, path, shape):
        return self

    def sorted_elements(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor | None]:
        """``element_indices``, sorted, and the permutation that sorted them; None if they were sorted already."""
        flat = self.element_indices(indices, shape)
        return (flat, None) if self.is_slice or isinstance(self, Elements) else flat.sort()

    def as_elements(self, indices: Tensor, values: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """The indices and values of the same delta with every entry as an element, sorted."""
        flat, order = self.sorted_elements(indices, shape)
        return flat, values.reshape(-1) if order is None else values.reshape(-1)[order]

    def accumulate_(self, scores: Tensor, gradients: PerSampleGradients, half: Tensor) -> None:
        """Add the squared per-sample gradients of one batch to the running sums ``scores[half]``.

        ``scores`` is ``[2, units]`` float32, ``half`` ``[b]`` is 0 or 1, on the CPU: no device has to be waited for.
        """
        o, i = gradients.shape
        squares = scores.new_zeros(2, o * i)
        gradients.add_element_scores_(squares, half)
        for row in (0, 1):
            scores[row] += self.reduce(squares[row].view(o, i))

    def gather(self, weight: Tensor, indices: Tensor) -> Tensor:
        """The entries of ``weight`` ``[o, i]`` on the support, shaped like the values."""
        shape = (weight.shape[0], weight.shape[1])
        entries = ELEMENTS.gather(weight, self.element_indices(indices, shape))
        return entries.view(self.values_shape(shape, len(indices)))

    def put_(self, weight: Tensor, indices: Tensor, entries: Tensor) -> None:
        """Overwrite the entries of ``weight`` ``[o, i]`` on the support."""
        ELEMENTS.put_(weight, self.element_indices(indices, (weight.shape[0], weight.shape[1])), entries.reshape(-1))

    def stored_input(self, x: Tensor, indices: Tensor) -> Tensor:
        """The part of ``x`` ``[n, i]`` that ``value_gradient`` needs; ``x`` itself unless a part saves memory."""
        return x

    def value_gradient(self, stored: Tensor, g: Tensor, indices: Tensor) -> Tensor:
        """The entries of ``g.mT @ x`` on the support, from ``stored_input(x)`` and ``g`` ``[n, o]``."""
        shape = (g.shape[1], stored.shape[1])
        flat, order = self.sorted_elements(indices, shape)
        gradient = sampled_product(stored, g, flat)
        if order is not None:
            gradient = torch.empty_like(gradient).index_copy_(0, order, gradient)
        return gradient.view(self.values_shape(shape, len(indices)))

    def add_product_(self, y: Tensor, x: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``y += scale * x @ delta.mT`` for ``y`` ``[n, o]`` and ``x`` ``[n, i]`` in the dtype of the values."""
        ELEMENTS.add_product_(y, x, *self.as_elements(indices, values, (y.shape[1], x.shape[1])), scale)

    def add_input_gradient_(self, gx: Tensor, g: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``gx += scale * g @ delta`` for ``gx`` ``[n, i]`` and ``g`` ``[n, o]`` in the dtype of the values."""
        ELEMENTS.add_input_gradient_(gx, g, *self.as_elements(indices, values, (g.shape[1], gx.shape[1])), scale)

    def delta_rows(self, rows: Tensor, indices: Tensor, values: Tensor, shape: Shape) -> Tensor:
        """The given rows of the delta, dense ``[n, i]``; differentiable in ``values``."""
        return ELEMENTS.delta_rows(rows, *self.as_elements(indices, values, shape), shape)

    def decay(self, covariance: Covariance, indices: Tensor, shape: Shape) -> Decay:
        """Harm decay of the values on the support; by default with the diagonal of the covariance."""
        features = self.element_indices(indices, shape) % shape[1]
        return DiagonalDecay(covariance.diagonal()[features].view(self.values_shape(shape, len(indices))))

    def added(self, weight: Tensor, indices: Tensor, values: Tensor, scale: float) -> Tensor:
        """The entries on the support after the delta is added: in float32 at least, rounded once."""
        return sum_rounded_once(self.gather(weight, indices), values, scale)

    def add_(self, weight: Tensor, indices: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """``weight += scale * delta`` in place, rounding each changed entry once."""
        self.put_(weight, indices, self.added(weight, indices, values, scale))


GRANULARITIES: Registry[type[UnitKind]] = Registry("granularity", named=True)


def granularity_from(value: str | Mapping[str, Any] | UnitKind) -> UnitKind:
    """A granularity from its name, its dict (see ``UnitKind.to_dict``) or itself; ``ValueError`` if unknown."""
    return value if isinstance(value, UnitKind) else GRANULARITIES.build(value, "granularity")


class _Slices(Granularity):
    """Rows or columns: slices of the weight along ``weight_dim``, which is also the dimension of the values."""

    weight_dim: ClassVar[int]

    def units(self, shape):
        return shape[self.weight_dim]

    def parameters_per_unit(self, shape):
        return shape[1 - self.weight_dim]

    def reduce(self, matrix):
        return matrix.sum(1 - self.weight_dim)


@GRANULARITIES.register("row")
@dataclass(frozen=True)
class Rows(_Slices):
    """Output features: row ``o`` of the weight (FGGM's choice). Values are ``[k, i]``."""

    weight_dim = 0

    def values_shape(self, shape, k):
        return (k, shape[1])

    def gather(self, weight, indices):
        return weight.index_select(0, indices)

    def put_(self, weight, indices, entries):
        put_rows_(weight, indices, entries)

    def element_indices(self, indices, shape):
        return (indices.long()[:, None] * shape[1] + torch.arange(shape[1], device=indices.device)).flatten()

    def accumulate_(self, scores, gradients, half):
        scores.index_add_(0, half.to(scores.device), gradients.row_scores().to(scores.dtype))

    def value_gradient(self, stored, g, indices):
        return gradient_product(select_columns(g, indices).mT, stored)

    def add_product_(self, y, x, indices, values, scale=1.0):
        y.index_add_(1, indices, (x @ values.mT).to(y.dtype), alpha=scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        _add_matrix_product_(gx, select_columns(g, indices), values, scale)

    def decay(self, covariance, indices, shape):
        return SpectralDecay(covariance.spectrum())

    def delta_rows(self, rows, indices, values, shape):
        if indices.numel() == 0:
            return values.new_zeros(len(rows), shape[1])
        position = torch.searchsorted(indices, rows.to(indices.dtype)).clamp_(max=len(indices) - 1)
        chosen = indices[position] == rows
        return values[position] * chosen[:, None].to(values.dtype)


@GRANULARITIES.register("column")
@dataclass(frozen=True)
class Columns(_Slices):
    """Input features: column ``i`` of the weight. Values are ``[o, k]``."""

    unit_dim = weight_dim = 1
    stores_partial_input = True

    def values_shape(self, shape, k):
        return (shape[0], k)

    def gather(self, weight, indices):
        return select_columns(weight, indices)

    def put_(self, weight, indices, entries):
        put_(weight, indices, entries)

    def element_indices(self, indices, shape):
        return (torch.arange(shape[0], device=indices.device)[:, None] * shape[1] + indices.long()).flatten()

    def accumulate_(self, scores, gradients, half):
        scores.index_add_(0, half.to(scores.device), gradients.column_scores().to(scores.dtype))

    def stored_input(self, x, indices):
        # the query, key and value layers share one input, but each would store a part of its own
        return select_columns(x, indices) if 3 * indices.numel() <= x.shape[1] else x

    def value_gradient(self, stored, g, indices):
        if stored.shape[1] == indices.numel():
            return gradient_product(g.mT, stored)
        return gradient_product(g.mT, select_columns(stored, indices))

    def add_product_(self, y, x, indices, values, scale=1.0):
        _add_matrix_product_(y, select_columns(x, indices), values.mT, scale)

    def decay(self, covariance, indices, shape):
        return SpectralDecay(covariance.spectrum(indices.long()))

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        gx.index_add_(1, indices, (g @ values).to(gx.dtype), alpha=scale)

    def delta_rows(self, rows, indices, values, shape):
        return values.new_zeros(len(rows), shape[1]).index_copy(1, indices.long(), values[rows])


@GRANULARITIES.register("element")
@dataclass(frozen=True)
class Elements(Granularity):
    """Single entries, as flat indices ``o * in + i``. Values are ``[k]``."""

    compresses_indices = True

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

    def gather(self, weight, indices):
        if weight.is_contiguous():
            return weight.view(-1).index_select(0, indices)
        return weight[indices // weight.shape[1], indices % weight.shape[1]]  # a transposed weight (Conv1D) has no view

    def put_(self, weight, indices, entries):
        if weight.is_contiguous():
            put_(weight.view(-1), indices, entries)
        else:
            weight.index_put_((indices // weight.shape[1], indices % weight.shape[1]), entries)

    def value_gradient(self, stored, g, indices):
        return sampled_product(stored, g, indices)

    def add_product_(self, y, x, indices, values, scale=1.0):
        starts = starts_of(indices, torch.arange(y.shape[1], device=y.device) * x.shape[1])
        add_sparse_product_(y, x, starts, indices % x.shape[1], values, scale)

    def add_input_gradient_(self, gx, g, indices, values, scale=1.0):
        rows, columns = indices // gx.shape[1], indices % gx.shape[1]
        columns, order = columns.sort(stable=True)
        starts = starts_of(columns, torch.arange(gx.shape[1], device=gx.device))
        add_sparse_product_(gx, g, starts, rows[order], values[order], scale)

    def delta_rows(self, rows, indices, values, shape):
        if is_recording():  # sizes in a recorded program must not depend on data
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


ELEMENTS = Elements()
