"""What harm decay costs: a training step with and without it, and its statistics against forward passes.

Steps are interleaved in one process. Statistics are read from 32 paragraphs, one paragraph per forward pass.

OMP_NUM_THREADS=1 python benchmarks/harm_decay.py [--quick]
"""

from __future__ import annotations

import argparse

import torch
from common import batches, interleaved, llama, ratios, show, write
from peft import get_peft_model

from fggm_peft import FGGMConfig, attach_harm_decay, input_covariance, select_parameters

PARAGRAPHS, LENGTH = 32, 128


class Training:
    """Optimizer steps of an adapter on one batch, four at a time."""

    def __init__(self, base: torch.nn.Module, data: dict, decays: bool, **config):
        settings = {"target_modules": "all-linear", "criterion": "random", "granularity": "column", **config}
        self.model = get_peft_model(base, FGGMConfig(**settings, harm_decay=1.0 if decays else 0.0))
        self.data = data
        if decays:
            select_parameters(self.model, reference=[batches(1, 8, 64)], progress=False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        attach_harm_decay(self.model, self.optimizer)

    def __call__(self) -> None:
        for _ in range(4):
            self.model(**self.data).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(quick: bool) -> dict[str, dict]:
    hidden, layers, repeats = (128, 2, 2) if quick else (1024, 4, 5)
    results = {}
    for density in (0.1, 0.3):
        data = batches(1, 4, 128)[0]
        variants = {
            "without harm decay": Training(llama(hidden, layers), data, False, density=density),
            "harm decay": Training(llama(hidden, layers), data, True, density=density),
        }
        results[f"step, {density:.0%} of the columns, 512 tokens"] = ratios(
            interleaved(variants, repeats), "without harm decay"
        )
    base = llama(hidden, layers)
    paragraphs = batches(PARAGRAPHS, 1, LENGTH)

    def two_passes() -> None:
        with torch.no_grad():
            for entry in paragraphs * 2:
                base(**entry)

    variants = {
        "64 forward passes": two_passes,
        "statistics": lambda: input_covariance(base, paragraphs, progress=False) and None,
    }
    results[f"statistics of {PARAGRAPHS} paragraphs"] = ratios(interleaved(variants, repeats), "64 forward passes")
    statistics = input_covariance(base, paragraphs, progress=False).nbytes
    blocks = sum(p.numel() for name, p in base.named_parameters() if "layers" in name)
    results["size"] = {"statistics": {"bytes": statistics, "share of a bfloat16 base": statistics / blocks / 2}}
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model; nothing is written")
    quick = parser.parse_args().quick
    results = measure(quick)
    for title, rows in results.items():
        show(title, rows)
    if not quick:
        print("written to", write("harm_decay", results))
