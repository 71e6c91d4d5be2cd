"""Peak memory of a run."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def accelerator() -> Any | None:
    """The torch module of an accelerator that reports its memory; None without one."""
    return next((device for device in (torch.cuda, torch.xpu) if device.is_available()), None)


def reset_peak_memory() -> None:
    """Start a new measurement. Only Linux supports this for the memory of a process."""
    gc.collect()
    if (device := accelerator()) is not None:
        device.empty_cache()
        device.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak_memory() -> int | None:
    """Bytes that an accelerator allocated at most, else the peak of the process's resident memory; None on Windows."""
    if (device := accelerator()) is not None:
        return device.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
