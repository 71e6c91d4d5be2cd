"""How much memory a run takes: the peak of each phase, and what PEFT's method comparison counts."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

INTERVAL = 0.05  # seconds between two looks at the resident memory
ACCELERATOR_MEMORY = (
    "accelerator_memory_reserved_avg",
    "accelerator_memory_max",
    "accelerator_memory_reserved_99th",
)


def accelerator() -> Any | None:
    """torch's module of the accelerator here, of which memory can be asked; None without one."""
    return next((device for device in (torch.cuda, torch.xpu) if device.is_available()), None)


class PeakMemory:
    """The largest memory of each phase, in bytes.

    On an accelerator it is torch's own high-water mark of what was allocated there. Elsewhere it is the resident
    memory above what the process held when this was made, since an allocator gives little back after earlier runs.
    The kernel's mark cannot be reset between two phases, so a thread looks: a peak shorter than its interval may be
    missed.

    Attributes:
        peaks: phase -> bytes.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._device = accelerator()
        self._process = psutil.Process(os.getpid())
        self._held = self._process.memory_info().rss

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a block; ``switch`` within it goes on to another phase."""
        self._begin(name)
        stop = threading.Event()
        watching = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        if self._device is None:
            watching.start()
        try:
            yield
        finally:
            self._end()
            stop.set()

    def switch(self, name: str) -> None:
        """Count what comes from here on to another phase."""
        self._end()
        self._begin(name)

    def _begin(self, name: str) -> None:
        if self._device is not None:
            self._device.reset_peak_memory_stats()
        self._phase = name
        self._look()

    def _end(self) -> None:
        self._look()
        self._phase = None

    def _look(self) -> None:
        phase = self._phase
        if phase is not None:
            device = self._device
            resident = self._process.memory_info().rss - self._held
            now = resident if device is None else device.max_memory_allocated()
            self.peaks[phase] = max(self.peaks.get(phase, 0), now)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL):
            self._look()


class TrainingBegins(TrainerCallback):
    """Ends the phase of selection, which a trainer does before its first step."""

    def __init__(self, memory: PeakMemory):
        self.memory = memory

    def on_train_begin(self, args, state, control, **kwargs):
        self.memory.switch("training")


class MemoryLog(TrainerCallback):
    """Logs what the accelerator has reserved at every step. Make one for each training, right before it.

    What is reserved is what PEFT's method comparison counts; the allocator keeps more than is allocated.
    """

    def __init__(self) -> None:
        self.reserved: list[int] = []
        self.device = accelerator()

    def on_step_end(self, args, state, control, **kwargs):
        if self.device is not None:
            self.reserved.append(self.device.memory_reserved())

    def figures(self) -> dict[str, int]:
        """Average over steps, maximum of all times, and 99th percentile over steps, in bytes; zeros without steps."""
        if self.device is None or not self.reserved:
            return dict.fromkeys(ACCELERATOR_MEMORY, 0)
        log = torch.tensor(self.reserved, dtype=torch.float64)
        figures = (log.mean(), self.device.max_memory_reserved(), log.quantile(0.99))
        return {name: int(figure) for name, figure in zip(ACCELERATOR_MEMORY, figures, strict=True)}


def return_freed_memory() -> None:
    """Give memory that an earlier run freed back to the system, where the C library can."""
    gc.collect()
    if (device := accelerator()) is not None:
        device.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
