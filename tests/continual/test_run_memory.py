"""Peak memory of a run."""

from __future__ import annotations

from fggm_peft.continual import memory
from fggm_peft.continual.memory import peak_memory, reset_peak_memory


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
    monkeypatch.setattr(memory, "accelerator", lambda: None)
    reset_peak_memory()
    assert peak_memory() is None
