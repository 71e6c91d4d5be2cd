"""Products of 16-bit matrices in float32, without converted copies of them on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
_has_out_dtype = torch.__version__ >= "2.8"


def widened(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def multiplies_wide(a: Tensor, b: Tensor) -> bool:
    """Whether the device multiplies these 16-bit operands exactly, and sums and returns the products in float32."""
    if not (_has_out_dtype and a.is_cuda and a.dtype in HALF and a.dtype == b.dtype):
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return False
    if a.dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False):
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in (a, b)) and _has_tensor_cores(a.device)


def _has_tensor_cores(device: torch.device) -> bool:
    """Whether torch supports float32 results there: on NVIDIA's GPUs since Ampere."""
    return torch.version.hip is None and torch.cuda.get_device_properties(device).major >= 8


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` for matrices or batches of matrices, summed and returned in float32 at least.

    Tensor cores multiply 16-bit operands many times as fast as other units multiply float32 operands.
    """
    if not multiplies_wide(a, b):
        return torch.matmul(widened(a), widened(b), out=out)
    return _float32_product(a, b) if out is None else _float32_product(a, b, out=out)


def gradient_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; in float32 where that costs nothing, otherwise in the dtype of the operands."""
    return _float32_product(a, b) if multiplies_wide(a, b) else a @ b


def _float32_product(a: Tensor, b: Tensor, **out: Tensor) -> Tensor:
    return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32, **out)
