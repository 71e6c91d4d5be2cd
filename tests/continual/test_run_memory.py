"""Peak memory of a run."""

from __future__ import annotations

import mmap
import sys

import pytest

from fggm_peft.continual import memory
from fggm_peft.continual.memory import peak_memory, reset_peak_memory

MIB = 2**20


def write_and_free(size: int) -> None:
    """Use memory mapped directly from the system, because an allocator would reuse freed memory."""
    with mmap.mmap(-1, size) as block:
        block.write(b"1" * size)


@pytest.mark.skipif(memory.accelerator() is not None, reason="looks at the process's own memory")
def test_the_peak_contains_memory_that_was_freed():
    reset_peak_memory()
    before = peak_memory()
    write_and_free(256 * MIB)
    assert peak_memory() > before + 200 * MIB


@pytest.mark.skipif(memory.accelerator() is not None or sys.platform != "linux", reason="only Linux resets the peak")
def test_the_peak_excludes_memory_that_was_freed_before_the_reset():
    write_and_free(256 * MIB)
    before = peak_memory()
    reset_peak_memory()
    assert peak_memory() < before - 200 * MIB


def test_on_an_accelerator_the_peak_comes_from_the_allocator(monkeypatch):
    class Device:
        peak = 7

        def empty_cache(self):
            pass

        def reset_peak_memory_stats(self):
            self.peak = 0

        def max_memory_allocated(self):
            return self.peak

    device = Device()
    monkeypatch.setattr(memory, "accelerator", lambda: device)
    assert peak_memory() == 7
    reset_peak_memory()
    assert peak_memory() == 0
