"""Memory of a run: the peak of each phase, and the values of PEFT's method comparison."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

INTERVAL = 0.05  # seconds between two readings of the resident memory
ACCELERATOR_MEMORY = (
    "accelerator_memory_reserved_avg",
    "accelerator_memory_max",
    "accelerator_memory_reserved_99th",
)


def accelerator() -> Any | None:
    """The torch module of an accelerator that reports its memory; None without one."""
    return next((device for device in (torch.cuda, torch.xpu) if device.is_available()), None)


class MemoryLog(TrainerCallback):
    """The peak memory of each phase in bytes, and the memory that an accelerator reserves at each step.

    On an accelerator, a peak is torch's high-water mark of the allocated memory. Elsewhere it is the resident memory
    above that at construction, because an allocator gives little back after earlier runs. A thread reads it, because
    the kernel's mark cannot be reset between phases; it may miss a peak shorter than ``INTERVAL``.

    As a callback of a trainer it starts the phase "training" with the first step.

    Attributes:
        peaks: phase -> bytes.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._reserved: list[int] = []
        self._device = accelerator()
        self._process = psutil.Process(os.getpid())
        self._start = self._process.memory_info().rss

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the phase of a block."""
        self._begin(name)
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        if self._device is None:
            thread.start()
        try:
            yield
        finally:
            self._read()
            self._phase = None
            stop.set()

    def on_train_begin(self, args, state, control, **kwargs):
        self._read()
        self._begin("training")
        self._reserved.clear()

    def on_step_end(self, args, state, control, **kwargs):
        if self._device is not None:
            self._reserved.append(self._device.memory_reserved())

    def accelerator_memory(self) -> dict[str, int]:
        """Reserved memory of the last training: average over steps, maximum, 99th percentile; 0 without steps."""
        if self._device is None or not self._reserved:
            return dict.fromkeys(ACCELERATOR_MEMORY, 0)
        values = (np.mean(self._reserved), self._device.max_memory_reserved(), np.percentile(self._reserved, 99))
        return {name: int(value) for name, value in zip(ACCELERATOR_MEMORY, values, strict=True)}

    def _begin(self, name: str) -> None:
        if self._device is not None:
            self._device.reset_peak_memory_stats()
        self._phase = name
        self._read()

    def _read(self) -> None:
        phase, device = self._phase, self._device
        if phase is not None:
            resident = self._process.memory_info().rss - self._start
            now = resident if device is None else device.max_memory_allocated()
            self.peaks[phase] = max(self.peaks.get(phase, 0), now)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            self._read()


def return_freed_memory() -> None:
    """Return memory that an earlier run freed to the system, if the C library supports it."""
    gc.collect()
    if (device := accelerator()) is not None:
        device.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
