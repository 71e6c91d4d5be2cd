"""Peak memory of the phases of a run."""

from __future__ import annotations

import mmap
import time

import pytest

from fggm_peft.continual import memory
from fggm_peft.continual.memory import INTERVAL, MemoryLog, return_freed_memory

MIB = 2**20


def resident(size: int) -> mmap.mmap:
    """Memory mapped directly from the system, because an allocator would reuse freed memory."""
    block = mmap.mmap(-1, size)
    block.write(b"1" * size)
    return block


@pytest.mark.skipif(memory.accelerator() is not None, reason="looks at the process's own memory")
def test_the_peak_of_a_phase_excludes_earlier_memory():
    return_freed_memory()  # no freed memory returns to the system during the phases
    held = resident(64 * MIB)  # allocated earlier, so it does not count
    found = MemoryLog()
    with found.phase("selection"):
        small = resident(32 * MIB)
        time.sleep(3 * INTERVAL)
        found.on_train_begin(None, None, None)
        large = resident(128 * MIB)
        time.sleep(3 * INTERVAL)
        large.close()
    with found.phase("evaluation"):
        time.sleep(3 * INTERVAL)
    assert 30 * MIB < found.peaks["selection"] < 60 * MIB
    assert 155 * MIB < found.peaks["training"] < 200 * MIB
    assert found.peaks["evaluation"] < 60 * MIB
    assert len(held) and len(small)


def test_on_an_accelerator_the_peak_comes_from_the_allocator(monkeypatch):
    class Device:
        peak = 0

        def reset_peak_memory_stats(self):
            self.peak = 7

        def max_memory_allocated(self):
            return self.peak

    device = Device()
    monkeypatch.setattr(memory, "accelerator", lambda: device)
    found = MemoryLog()
    with found.phase("selection"):
        device.peak = 100
        found.on_train_begin(None, None, None)
        device.peak = 50
    assert found.peaks == {"selection": 100, "training": 50}
