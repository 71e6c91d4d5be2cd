"""How much of an accelerator's memory a training takes, as PEFT's method comparison counts it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

MEMORY = ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th")


def accelerator() -> Any | None:
    """torch's module of the accelerator here, of which memory can be asked; None without one."""
    return next((device for device in (torch.cuda, torch.xpu) if device.is_available()), None)


class MemoryLog(TrainerCallback):
    """Logs what the accelerator has reserved at every step. Make one for each training, right before it."""

    def __init__(self) -> None:
        self.reserved: list[int] = []
        self.device = accelerator()
        if self.device is not None:
            self.device.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if self.device is not None:
            self.reserved.append(self.device.memory_reserved())

    def figures(self) -> dict[str, int]:
        """Average over steps, maximum of all times, and 99th percentile over steps, in bytes; zeros without steps."""
        if self.device is None or not self.reserved:
            return dict.fromkeys(MEMORY, 0)
        log = torch.tensor(self.reserved, dtype=torch.float64)
        figures = (log.mean(), self.device.max_memory_reserved(), log.quantile(0.99))
        return {name: int(figure) for name, figure in zip(MEMORY, figures, strict=True)}
