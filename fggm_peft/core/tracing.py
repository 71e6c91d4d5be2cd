"""What a function may do while torch records or simulates a program."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_recording() -> bool:
    """Whether a program is recorded (torch.export, torch.jit.trace): sizes must not depend on data."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def has_data(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be read; in a dry run they cannot."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
