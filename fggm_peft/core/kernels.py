"""Decides which parts of the training step run as Triton kernels: on which device, in which dtype, at which size.

``adds``, ``samples`` and ``gathers`` decide; the functions with the same stem run the kernel. Callers use PyTorch's
operators in all other cases. Triton is imported when the first kernel runs, and never without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .registry import require_one_of

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALF)
_OLDEST = (8, 0)  # compute capability: Ampere is the first to multiply bfloat16

# Estimates from what a kernel reads and multiplies; none has been measured (docs/gpu.md).
_DOTS_MAX_DENSITY = {torch.float32: 0.05, torch.bfloat16: 0.015, torch.float16: 0.015}
_GATHERED_MAX_WIDTH = 2048  # above, the gathering is a small part of the time
_GATHERED_MIN_ENTRIES = 1 << 20  # below, there are too few tiles to fill the device

_VARIABLE = "FGGM_PEFT_TRITON"


def _checked(mode: str) -> str:
    require_one_of(f"{_VARIABLE} or use_triton()", mode, ("0", "1", "always"))
    return mode


_mode = _checked(os.environ.get(_VARIABLE, "1"))
# torch 2.8 brings Triton 3.4, the oldest version that the kernels were compiled with
_installed = torch.__version__ >= "2.8" and importlib.util.find_spec("triton") is not None


def use_triton(mode: str) -> str:
    """Set where kernels run in this process ("0" never, "1" where they should be faster, "always" where they can).

    Returns the previous mode. The environment variable ``FGGM_PEFT_TRITON`` sets the initial one.
    """
    global _mode
    before, _mode = _mode, _checked(mode)
    return before


def _on_gpu(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    device = torch.cuda.get_device_properties(tensor.get_device())  # a constant to torch.compile, unlike the capability
    return (device.major, device.minor) >= _OLDEST


def _can_run(*tensors: Tensor) -> bool:
    """Whether they are plain tensors on a GPU, of supported dtypes, without a gradient to record or an export."""
    return (
        _mode != "0"
        and _installed
        and _on_gpu(tensors[0])
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _DTYPES for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and not is_recording()
    )


def is_recording() -> bool:
    """Whether a program is recorded (torch.export, torch.jit.trace): it must consist of PyTorch's operators."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def adds(weight: Tensor, values: Tensor) -> bool:
    """Whether ``add_elements_`` takes these: its single pass over the entries is expected to win everywhere."""
    return _can_run(weight, values)


def samples(x: Tensor, g: Tensor, indices: Tensor) -> bool:
    """Whether ``sampled_product`` takes these: for many entries in float32, PyTorch's product is better."""
    if not (_can_run(x, g) and x.dtype == g.dtype):
        return False
    return _mode == "always" or x.dtype in _HALF or _few(x, g, indices)


def gathers(chosen: Tensor, other: Tensor, indices: Tensor) -> bool:
    """Whether ``gathered_product`` takes these: gathering must be a large part of the work."""
    if not (_can_run(chosen, other) and chosen.dtype == other.dtype):
        return False
    width = other.shape[1]
    wins = width <= _GATHERED_MAX_WIDTH and indices.numel() * width >= _GATHERED_MIN_ENTRIES
    return _mode == "always" or (wins and chosen.dtype in _HALF)


def _few(x: Tensor, g: Tensor, indices: Tensor) -> bool:
    return indices.numel() <= _DOTS_MAX_DENSITY[x.dtype] * g.shape[1] * x.shape[1]


def _operator(schema: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make a function an operator under torch.compile, which then keeps its graph in one piece.

    Other calls run the function itself: an operator costs 20 to 160 microseconds a call (measured on a CPU), as long as
    some of the kernels take.
    """

    def decorate(function: Callable) -> Callable:
        name = f"fggm_peft::{function.__name__}"
        operator = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments):
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return call

    return decorate


@_operator("(Tensor(a!) weight, Tensor indices, Tensor values, float scale) -> ()", lambda *_: None, ("weight",))
def add_elements_(weight: Tensor, indices: Tensor, values: Tensor, scale: float) -> None:
    """``weight.view(-1)[indices] += scale * values`` for a weight of any strides, added in float32 and rounded once."""
    from .triton import elements

    elements.add_elements_(weight, indices, values, scale)


@_operator("(Tensor x, Tensor g, Tensor indices) -> Tensor", lambda x, g, indices: x.new_empty(indices.numel()))
def sampled_product(x: Tensor, g: Tensor, indices: Tensor) -> Tensor:
    """The entries ``indices`` of ``g.mT @ x``, summed in float32: by dot products if they are few, else from tiles."""
    from .triton import elements

    return (elements.sampled_dots if _few(x, g, indices) else elements.sampled_tiles)(x, g, indices)


def _matrix(chosen: Tensor, other: Tensor, indices: Tensor, transposed: bool = False) -> Tensor:
    shape = indices.numel(), other.shape[1]
    return other.new_empty(shape[::-1] if transposed else shape)


@_operator("(Tensor chosen, Tensor other, Tensor indices, bool transposed=False) -> Tensor", _matrix)
def gathered_product(chosen: Tensor, other: Tensor, indices: Tensor, transposed: bool = False) -> Tensor:
    """``chosen[:, indices].mT @ other`` or its transpose, summed in float32 without a copy of the columns."""
    from .triton import tiles

    result = _matrix(chosen, other, indices, transposed)
    tiles.gathered_product_(result.mT if transposed else result, chosen, other, indices)
    return result
