"""Advice in the error when the selection pass runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# texts of torch's errors on a CPU; devices raise torch.OutOfMemoryError
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def with_advice(index: int, batch: Mapping[str, Any] | None) -> Iterator[None]:
    """Add the batch and a remedy to an out-of-memory error, whose type does not change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in _SIGNS):
            raise
        shapes = [list(value.shape) for value in (batch or {}).values() if isinstance(value, Tensor) and value.dim()]
        raise type(error)(
            f"{error}\nThe selection pass ran out of memory in batch {index}, whose shape is "
            f"{shapes[0] if shapes else 'unknown'}. Use a smaller batch size, which selects the same. Gradient "
            "checkpointing also helps and, for single elements, score_memory=."
        ) from error
