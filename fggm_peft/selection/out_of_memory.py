"""What to do when the Fisher pass runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# what torch says when the memory of a CPU is exhausted; devices raise torch.OutOfMemoryError
_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def advised(index: int, batch: Mapping[str, Any] | None) -> Iterator[None]:
    """Add to an out-of-memory error which batch it was and what helps; its type stays what torch raised."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(s in str(error) for s in _SIGNS):
            raise
        shapes = [list(value.shape) for value in (batch or {}).values() if isinstance(value, Tensor) and value.dim()]
        raise type(error)(
            f"{error}\nThe selection pass ran out of memory in batch {index}, whose shape is "
            f"{shapes[0] if shapes else 'unknown'}. Scores are taken sample by sample, so a dataloader with a smaller "
            "batch size chooses the same; gradient checkpointing and, for single elements, score_memory= help too."
        ) from error
