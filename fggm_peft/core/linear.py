"""``x @ (weight + deltas).mT`` for sparse deltas, forward and backward, in two forms of one meaning.

*Effective weight*: the product is taken with the entries that the merge will give, rounding included.
They are written into a copy of the weight, which is made again in backward and never kept; or, where
few positions would have to pay for the copy, chosen rows or columns are multiplied by themselves.
*Additive*: the delta's own product is added to the base layer's output; the weight is never needed.
Measured in benchmarks/forms.py and benchmarks/suite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .weight_delta import WeightDelta

WeightSource = Callable[[], Tensor]
"""Gives a weight ``[o, i]`` that the caller may overwrite: a copy, or a dequantized temporary."""


def effective_linear(x: Tensor, weight: WeightSource, bias: Tensor | None, deltas: Sequence[WeightDelta]) -> Tensor:
    """``x @ (weight + sum of deltas).mT + bias`` in the form of one product.

    Args:
        x: ``[..., i]``.
        weight: called once here and once more in backward; nothing of size ``[o, i]`` is kept.
        bias: ``[o]`` or None.
        deltas: their values get gradients in their own dtype.
    """
    # flat inside the function: a view that it returned could not be modified in place by the model
    flat = _EffectiveLinear.apply(_flat(x), bias, weight, tuple(deltas), False, *(d.values for d in deltas))
    return flat.view(*x.shape[:-1], flat.shape[-1])


def split_linear(x: Tensor, weight: WeightSource, bias: Tensor | None, delta: WeightDelta) -> Tensor:
    """As ``effective_linear`` for one delta of rows or columns, in two products and without a copy of the weight.

    Args:
        x: ``[..., i]``.
        weight: called here and in backward; what it gives is only read.
        bias: ``[o]`` or None.
        delta: its values get gradients in their own dtype.
    """
    flat = _EffectiveLinear.apply(_flat(x), bias, weight, (delta,), True, delta.values)
    return flat.view(*x.shape[:-1], flat.shape[-1])


def pays_to_split(delta: WeightDelta, shape: tuple[int, int], positions: int) -> bool:
    """Whether ``split_linear`` takes less time than ``effective_linear`` with a weight that has to be copied.

    It multiplies with the chosen units once more, and copies the input (or, in backward, the output's gradient). Where
    the two meet was measured on a CPU, in float32 and bfloat16 (benchmarks/forms.py).

    Args:
        delta: any.
        shape: the weight's.
        positions: rows of the input ``[n, i]``.
    """
    dim = delta.granularity.weight_dim
    if dim is None or torch.compiler.is_compiling():  # each size at which a layer changes would be compiled for
        return False
    density = delta.indices.numel() / shape[dim]
    return positions * (density / 24 + 3 / shape[1 - dim]) < 1


def effective_weight(weight: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """Add the deltas to ``weight`` ``[o, i]`` in place, one after another, and return it."""
    for delta in deltas:
        delta.granularity.add_(weight, delta.indices, delta.values, delta.scale)
    return weight


def additive_linear(base_output: Tensor, x: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """``base_output + x @ (sum of deltas).mT`` without any weight.

    Args:
        base_output: ``[..., o]``, what the base layer made of ``x``.
        x: ``[..., i]``.
        deltas: their values get gradients in their own dtype.
    """
    plain = not torch.is_grad_enabled() and not is_autocast(x)
    if plain or torch.compiler.is_exporting():  # an exported program holds operators, and an autograd function is none
        return _with_products(_flat(base_output), _flat(x), deltas).view(base_output.shape)
    flat = _AdditiveLinear.apply(_flat(base_output), _flat(x), tuple(deltas), *(d.values for d in deltas))
    return flat.view(base_output.shape)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast would choose another dtype for a product with ``x``; of float64 it never does."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind)


def _with_products(base_output: Tensor, x: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    y = base_output.clone()  # the base layer's own backward may need it as it is
    for delta in deltas:
        inputs, values = _of_one_dtype(x, delta.values)
        delta.granularity.add_product_(y, inputs, delta.indices, values, delta.scale)
    return y


_FEW_POSITIONS = 16
"""Up to so many, a product in float32 takes less time than rounding the values to 16 bits for it."""


def _of_one_dtype(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of ``x``; with few positions in the wider of the two, which leaves wide values as they are."""
    dtype = torch.promote_types(x.dtype, values.dtype) if len(x) < _FEW_POSITIONS else x.dtype
    return x.to(dtype), values.to(dtype)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _save_for_backward(ctx, first: int, x: Tensor, values: Sequence[Tensor]) -> None:
    """Keep the values, and of the input what the gradients of those values need that want one."""
    kept = [
        delta.granularity.stored_input(x, delta.indices) if ctx.needs_input_grad[first + position] else None
        for position, delta in enumerate(ctx.deltas)
    ]
    ctx.save_for_backward(*values, *kept)


def _saved_for_backward(ctx) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """The values, and what was kept of the input for each of them."""
    saved = ctx.saved_tensors
    return saved[: len(ctx.deltas)], saved[len(ctx.deltas) :]


def _value_gradients(deltas: Sequence[WeightDelta], kept: Sequence[Tensor | None], g: Tensor, values: Sequence[Tensor]):
    """Gradients of the values of every delta that wants one, and None for the others."""
    for delta, x, value in zip(deltas, kept, values, strict=True):
        if x is None:
            yield None
            continue
        gradient = delta.granularity.value_gradient(x, g, delta.indices).to(value.dtype)
        yield gradient if delta.scale == 1 else gradient.mul_(delta.scale)


def _as_given(method: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast off: the callers have chosen every dtype, and a product in another one would not add up."""

    @functools.wraps(method)
    def wrapper(ctx, first: Tensor, *rest):
        if not torch.amp.is_autocast_available(first.device.type):  # the meta device
            return method(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapper


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    @_as_given
    def forward(ctx, x, bias, weight, deltas, splits, *values):
        ctx.weight, ctx.deltas, ctx.splits = weight, deltas, splits
        _save_for_backward(ctx, 5, x, values)
        if splits:
            return _split_product(x, weight(), bias, deltas[0])
        return F.linear(x, effective_weight(weight(), deltas).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx, g):
        values, kept = _saved_for_backward(ctx)
        gx = gb = None
        if ctx.needs_input_grad[0]:
            if ctx.splits:
                gx = _split_product(g, ctx.weight(), None, ctx.deltas[0], transposed=True)
            else:
                gx = g @ effective_weight(ctx.weight(), ctx.deltas).to(g.dtype)
        if ctx.needs_input_grad[1]:
            gb = g.sum(0)
        return (gx, gb, None, None, None, *_value_gradients(ctx.deltas, kept, g, values))


def _split_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: WeightDelta, transposed: bool = False
) -> Tensor:
    """``x @ (weight + delta).mT + bias``, or with the transposed weight, the chosen units multiplied by themselves."""
    units = delta.granularity.added(weight, delta.indices, delta.values, delta.scale).to(x.dtype)
    weight, indices = weight.to(x.dtype), delta.indices.long()
    dim = delta.granularity.weight_dim
    assert dim is not None
    if transposed:
        weight, units, dim = weight.mT, units.mT, 1 - dim
    if dim == 0:
        bias_of_units = None if bias is None else bias.index_select(0, indices)
        return F.linear(x, weight, bias).index_copy_(1, indices, F.linear(x, units, bias_of_units))
    return F.linear(x.index_fill(1, indices, 0), weight, bias).addmm_(x.index_select(1, indices), units.mT)


class _AdditiveLinear(torch.autograd.Function):
    @staticmethod
    @_as_given
    def forward(ctx, base_output, x, deltas, *values):
        ctx.deltas, ctx.input_size = deltas, x.shape[1]
        _save_for_backward(ctx, 3, x, values)
        return _with_products(base_output, x, deltas)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx, g):
        values, kept = _saved_for_backward(ctx)
        gx = None
        if ctx.needs_input_grad[1]:
            gx = g.new_zeros(len(g), ctx.input_size)
            for delta, value in zip(ctx.deltas, values, strict=True):
                gradient, value = _of_one_dtype(g, value)
                delta.granularity.add_input_gradient_(gx, gradient, delta.indices, value, delta.scale)
        return (g, gx, None, *_value_gradients(ctx.deltas, kept, g, values))


def effective_matrix(weight: WeightSource, deltas: Sequence[WeightDelta]) -> Tensor:
    """``weight + sum of deltas`` itself, ``[o, i]``, for layers whose product is not a plain one.

    The gradient at the result may be dense; the values get their entries of it.
    """
    if torch.compiler.is_exporting():
        return effective_weight(weight(), deltas)
    return _EffectiveMatrix.apply(weight, tuple(deltas), *(d.values for d in deltas))


class _EffectiveMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, deltas, *values):
        ctx.deltas = deltas
        ctx.value_dtypes = [value.dtype for value in values]
        return effective_weight(weight(), deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gradients: list[Tensor | None] = []
        for position, (delta, dtype) in enumerate(zip(ctx.deltas, ctx.value_dtypes, strict=True)):
            if ctx.needs_input_grad[2 + position]:
                entries = delta.granularity.gather(g, delta.indices).to(dtype)
                gradients.append(entries * delta.scale)
            else:
                gradients.append(None)
        return (None, None, *gradients)
