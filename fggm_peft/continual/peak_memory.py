"""Peak memory of the phases of a run: on an accelerator what was allocated there, else the process's resident memory."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from transformers import TrainerCallback

INTERVAL = 0.05  # seconds between two looks at the resident memory


class PeakMemory:
    """The largest memory of each phase, in bytes.

    On CUDA it is torch's own high-water mark. Elsewhere the kernel's mark cannot be reset between two phases, so a
    thread looks at the resident memory: a peak shorter than its interval may be missed.

    Attributes:
        peaks: phase -> bytes.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._phase: str | None = None
        self._process = psutil.Process(os.getpid())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch a block; ``switch`` within it goes on to another phase."""
        self._begin(name)
        stop = threading.Event()
        watching = threading.Thread(target=self._watch, args=(stop,), daemon=True)
        if not torch.cuda.is_available():
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
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._phase = name
        self._look()

    def _end(self) -> None:
        self._look()
        self._phase = None

    def _look(self) -> None:
        phase = self._phase
        if phase is not None:
            cuda = torch.cuda.is_available()
            now = torch.cuda.max_memory_allocated() if cuda else self._process.memory_info().rss
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


def return_freed_memory() -> None:
    """Give memory that an earlier run freed back to the system, where the C library can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
