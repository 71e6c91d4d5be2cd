"""Weights that autograd does not keep for backward, because they can be made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def rebuilt_in_backward(
    weights: Sequence[Tensor], make: Callable[[int], Tensor], values: Sequence[Tensor]
) -> AbstractContextManager:
    """Let operations in this context save views of the weights as shapes. Backward makes each weight once more.

    Other hooks for saved tensors keep their effect: activation checkpointing does not keep the weights either.

    Args:
        weights: their strides must be those of ``make``'s results.
        make: position of a weight -> the same weight in new memory.
        values: tensors that the weights depend on; an in-place change before backward is an error.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_hooks():
        return nullcontext()
    positions = {weight.untyped_storage()._cdata: position for position, weight in enumerate(weights)}
    versions = [value._version for value in values]
    made: dict[int, Tensor] = {}  # freed with the last operation that saved a view

    def pack(tensor: Tensor) -> Any:
        position = positions.get(tensor.untyped_storage()._cdata)
        return tensor if position is None else (position, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if versions != [value._version for value in values]:
            raise RuntimeError("the values of an adapter were modified by an inplace operation before backward")
        position, *view = packed
        if position not in made:
            with torch.no_grad():
                made[position] = make(position)
        return made[position].as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _has_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
