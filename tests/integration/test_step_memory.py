"""A training step allocates no more than a LoRA step with equally many trainable values, on dense and 4-bit bases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import quantized

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
from suite.measurements import Step
from suite.methods import METHODS, targeted_values, trainable

HIDDEN, LAYERS, VOCABULARY = 256, 2, 512


def peaks(kind: str, density: float, size: int, length: int, checkpointing: bool = False) -> tuple[float, float]:
    """Peak memory, in MiB, of a step with FGGM rows and of a step with LoRA (QLoRA on a 4-bit base)."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32

    base = common.llama(HIDDEN, LAYERS, dtype, VOCABULARY).requires_grad_(False)
    base = quantized(base, kind) if kind == "nf4" else base
    values = round(density * targeted_values(base))
    rows, lora = (METHODS[name](base, values) for name in ("FGGM rows", "LoRA"))
    assert trainable(rows) == pytest.approx(trainable(lora), rel=0.08)
    result = []
    for model in (rows, lora):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        step = Step(model, common.batches(1, size, length, VOCABULARY)[0])
        step()  # the first step allocates the optimizer's state
        result.append(common.peak_mib(step))
    return result[0], result[1]


@pytest.mark.parametrize(("density", "checkpointing"), [(0.3, False), (0.05, False), (0.05, True)])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_a_step_on_rows_takes_no_more_memory_than_lora(kind, density, checkpointing):
    rows, lora = peaks(kind, density, 4, 128, checkpointing)
    assert rows <= 1.05 * lora


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_a_step_with_few_positions_takes_no_more_memory_than_lora(kind):
    """A float32 weight is copied, which takes more than the activations of 24 positions."""
    rows, lora = peaks(kind, 0.05, 1, 24)
    assert rows <= 1.05 * lora
