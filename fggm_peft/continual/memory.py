"""Peak memory of a run on an accelerator."""

from __future__ import annotations

import gc
from typing import Any

import torch


def accelerator() -> Any | None:
    """The torch module of an accelerator that reports its memory; None without one."""
    return next((device for device in (torch.cuda, torch.xpu) if device.is_available()), None)


def reset_peak_memory() -> None:
    if (device := accelerator()) is not None:
        gc.collect()
        device.empty_cache()
        device.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Bytes that the accelerator allocated at most since the reset; None without one."""
    device = accelerator()
    return None if device is None else device.max_memory_allocated()
