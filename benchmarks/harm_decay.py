"""What harm decay costs: a training step with and without it, and its statistics against forward passes.

Steps are interleaved in one process. Statistics are read from 32 paragraphs, one paragraph per forward pass.

OMP_NUM_THREADS=1 python benchmarks/harm_decay.py [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import batches, llama, show, write
from peft import get_peft_model
from suite.bases import sharing_weights
from suite.measurements import timed

from fggm_peft import FGGMConfig, HarmDecay, InputCovariance, input_covariance
from fggm_peft.retention.harm_decay import EVERY

PARAGRAPHS, LENGTH = 32, 128
FLOOR, FORWARD = "without harm decay", "64 forward passes"
SECONDS = 60.0  # of one timing


class Training:
    """Optimizer steps of an adapter on one batch, as many as between two decays.

    Args:
        every: steps between two decays; None trains without harm decay.
    """

    def __init__(
        self, base: torch.nn.Module, data: dict, covariance: InputCovariance, every: int | None, density: float
    ):
        settings = {"target_modules": "all-linear", "criterion": "random", "granularity": "column"}
        self.model, self.data = get_peft_model(sharing_weights(base), FGGMConfig(**settings, density=density)), data
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        if every is not None:
            HarmDecay(covariance, every=every).attach(self.model, self.optimizer)

    def __call__(self) -> None:
        for _ in range(EVERY):
            self.model(**self.data).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(
    hidden: int, layers: int, seconds: float, batch: int = 4, length: int = 128, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Any]]:
    """Tables of a step for two densities and two intervals, of the statistics, and of their size."""
    base, paragraphs = llama(hidden, layers, dtype).requires_grad_(False), batches(PARAGRAPHS, 1, LENGTH)
    covariance = input_covariance(base, paragraphs, progress=False)
    (data,) = batches(1, batch, length)
    results = {}
    for density in (0.1, 0.3):
        intervals = {FLOOR: None, "harm decay": EVERY, "harm decay, every step": 1}
        calls = {name: Training(base, data, covariance, every, density) for name, every in intervals.items()}
        title = f"step with harm decay: {density:.0%} of the columns, {batch * length} tokens"
        results[title] = timed(calls, FLOOR, seconds)

    def two_passes() -> None:
        with torch.no_grad():
            for entry in paragraphs * 2:
                base(**entry)

    def statistics() -> None:
        input_covariance(base, paragraphs, progress=False)

    calls = {FORWARD: two_passes, "statistics": statistics}
    table = timed(calls, FORWARD, seconds)
    blocks = sum(p.numel() for name, p in base.named_parameters() if "layers" in name)
    size = {"bytes": covariance.nbytes, "share of a bfloat16 base": covariance.nbytes / blocks / 2}
    table["rows"]["statistics"] |= size
    return results | {f"statistics of harm decay: {PARAGRAPHS} paragraphs of {LENGTH} tokens": table}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is written")
    quick = parser.parse_args().quick
    results = measure(128, 2, 1.0) if quick else measure(1024, 4, SECONDS)
    for title, table in results.items():
        show(f"{title} (noise {table['noise']:.2f})", table["rows"])
    if not quick:
        print("written to", write("harm_decay", results))
