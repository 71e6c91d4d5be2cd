"""``x @ (weight + deltas).mT`` for sparse deltas, forward and backward, in two forms.

*Effective weight*: the product uses the entries that a merge would write, rounding included. They are written into a
copy of the weight. Backward makes the copy again, and nothing keeps it.
*Additive*: the delta's own product is added to the base layer's output; the weight is not needed.
benchmarks/suite measures both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tracing import is_recording
from .weight_delta import WeightDelta

WeightSource = Callable[[], Tensor]
"""Returns a weight ``[o, i]`` that the caller may overwrite: a copy, or a dequantized temporary."""


def effective_linear(
    x: Tensor,
    weight: WeightSource,
    bias: Tensor | None,
    deltas: Sequence[WeightDelta],
    version: Callable[[], Hashable] | None = None,
) -> Tensor:
    """``x @ (weight + sum of deltas).mT + bias``.

    Args:
        x: ``[..., i]``.
        weight: called once in forward and once in backward; nothing of size ``[o, i]`` is kept.
        version: differs after the weight was changed, so that backward raises a ``RuntimeError``.
        bias: ``[o]`` or None.
        deltas: their values receive gradients in their own dtype.
    """
    # the function is given a flat input, because a view that it returned could not be modified in place by the model
    flat = _EffectiveLinear.apply(_flat(x), bias, weight, version, tuple(deltas), *(d.values for d in deltas))
    return flat.view(*x.shape[:-1], flat.shape[-1])


def effective_weight(weight: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """Add the deltas to ``weight`` ``[o, i]`` in place, one after another, and return it."""
    for delta in deltas:
        delta.granularity.add_(weight, delta.indices, delta.values, delta.scale)
    return weight


def effective_matrix(
    weight: WeightSource, deltas: Sequence[WeightDelta], parts: Sequence[Callable[[Tensor], Tensor]] | None = None
) -> Tensor:
    """``weight + sum of deltas``, ``[o, i]``, for layers that compute more than a matrix product.

    The gradient of the result may be dense; the values receive their entries of it.

    Args:
        parts: for a stack of weights, the view ``[o, i]`` of it that each delta changes.
    """
    parts = parts or [lambda whole: whole] * len(deltas)
    if is_recording():
        return _with_parts(weight(), deltas, parts)
    return _EffectiveMatrix.apply(weight, tuple(deltas), tuple(parts), *(d.values for d in deltas))


def _with_parts(weight: Tensor, deltas: Sequence[WeightDelta], parts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for delta, part in zip(deltas, parts, strict=True):
        effective_weight(part(weight), [delta])
    return weight


def additive_linear(base_output: Tensor, x: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    """``base_output + x @ (sum of deltas).mT`` without the weight.

    Args:
        base_output: ``[..., o]``, the base layer's output for ``x``.
        x: ``[..., i]``.
        deltas: their values receive gradients in their own dtype.
    """
    plain = not torch.is_grad_enabled() and not is_autocast(x)
    if plain or is_recording():
        return _with_products(_flat(base_output), _flat(x), deltas).view(base_output.shape)
    flat = _AdditiveLinear.apply(_flat(base_output), _flat(x), tuple(deltas), *(d.values for d in deltas))
    return flat.view(base_output.shape)


def is_autocast(x: Tensor) -> bool:
    """Whether autocast would choose another dtype for a product with ``x``; it never does for float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind)


def _with_products(base_output: Tensor, x: Tensor, deltas: Sequence[WeightDelta]) -> Tensor:
    y = base_output.clone()  # the base layer's backward may need the original
    for delta in deltas:
        inputs, values = _of_one_dtype(x, delta.values)
        delta.granularity.add_product_(y, inputs, delta.indices, values, delta.scale)
    return y


_FEW_POSITIONS = 16
"""Up to this number, a product in float32 takes less time than rounding the values to 16 bits for it."""


def _of_one_dtype(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of ``x``; with few positions, in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, values.dtype) if len(x) < _FEW_POSITIONS else x.dtype
    return x.to(dtype), values.to(dtype)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _save_for_backward(ctx, first: int, x: Tensor, values: Sequence[Tensor]) -> None:
    """Save the values and, for each that requires a gradient, the part of the input that the gradient needs."""
    stored = [
        delta.granularity.stored_input(x, delta.indices) if ctx.needs_input_grad[first + position] else None
        for position, delta in enumerate(ctx.deltas)
    ]
    ctx.save_for_backward(*values, *stored)


def _value_gradients(deltas: Sequence[WeightDelta], saved: Sequence[Tensor], g: Tensor) -> Iterator[Tensor | None]:
    """The gradients of the values of every delta; ``saved`` is ``ctx.saved_tensors``, which can be read only once."""
    for delta, values, x in zip(deltas, saved[: len(deltas)], saved[len(deltas) :], strict=True):
        if x is None:
            yield None
            continue
        gradient = delta.granularity.value_gradient(x, g, delta.indices).to(values.dtype)
        yield gradient if delta.scale == 1 else gradient.mul_(delta.scale)


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """The callers have chosen every dtype; a product in another dtype could not be added."""

    @functools.wraps(method)
    def wrapper(ctx, first: Tensor, *rest):
        if not is_autocast(first):
            return method(ctx, first, *rest)
        with torch.autocast(first.device.type, enabled=False):
            return method(ctx, first, *rest)

    return wrapper


def _once(method: Callable[..., Any]) -> Callable[..., Any]:
    """``once_differentiable``, without its cost unless a second derivative is requested."""
    checked = once_differentiable(method)

    @functools.wraps(method)
    def wrapper(ctx, g: Tensor):
        return checked(ctx, g) if torch.is_grad_enabled() else method(ctx, g)

    return wrapper


def _version(ctx) -> Hashable:
    """The version of the weight; None in compiled code, which saves the weight, so that torch compares versions."""
    return None if ctx.version is None or torch.compiler.is_compiling() else ctx.version()


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx, x, bias, weight, version, deltas, *values):
        ctx.weight, ctx.version, ctx.deltas = weight, version, deltas
        ctx.saved_version = _version(ctx)
        _save_for_backward(ctx, 5, x, values)
        return F.linear(x, effective_weight(weight(), deltas).to(x.dtype), bias)

    @staticmethod
    @_once
    @_without_autocast
    def backward(ctx, g):
        gx, gb, saved = None, None, ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            now = _version(ctx)
            if None not in (now, ctx.saved_version) and now != ctx.saved_version:
                raise RuntimeError(
                    "a base weight was modified between forward and backward, for example by merging an adapter, so "
                    "the gradient of its input cannot be computed"
                )
            gx = g @ effective_weight(ctx.weight(), ctx.deltas).to(g.dtype)
        if ctx.needs_input_grad[1]:
            gb = g.sum(0)
        return (gx, gb, None, None, None, *_value_gradients(ctx.deltas, saved, g))


class _AdditiveLinear(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(ctx, base_output, x, deltas, *values):
        ctx.deltas, ctx.input_size = deltas, x.shape[1]
        _save_for_backward(ctx, 3, x, values)
        return _with_products(base_output, x, deltas)

    @staticmethod
    @_once
    @_without_autocast
    def backward(ctx, g):
        gx, saved = None, ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            gx = g.new_zeros(len(g), ctx.input_size)
            for delta, values in zip(ctx.deltas, saved, strict=False):
                gradient, values = _of_one_dtype(g, values)
                delta.granularity.add_input_gradient_(gx, gradient, delta.indices, values, delta.scale)
        return (g, gx, None, *_value_gradients(ctx.deltas, saved, g))


class _EffectiveMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, deltas, parts, *values):
        ctx.deltas, ctx.parts, ctx.dtypes = deltas, parts, [v.dtype for v in values]
        return _with_parts(weight(), deltas, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gradients = [
            delta.granularity.gather(part(g), delta.indices).to(dtype) * delta.scale if needed else None
            for delta, part, dtype, needed in zip(
                ctx.deltas, ctx.parts, ctx.dtypes, ctx.needs_input_grad[3:], strict=True
            )
        ]
        return (None, None, None, *gradients)
