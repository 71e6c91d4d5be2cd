"""The implementations that the benchmark of the Fisher pass compares agree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import peers
import selection


@pytest.fixture
def model():
    return common.llama(64, 2, vocab=50).requires_grad_(False)


def test_all_implementations_of_row_scores_agree_with_the_loop(model):
    batch = common.batches(1, 3, 12, 50)[0]
    implementations = peers.peers(model)
    expected = implementations[peers.LOOP](batch)
    assert set(expected) == set(peers.targets(model))
    for scores in implementations.values():
        assert selection.error(scores(batch), expected) < 1e-5
    assert selection.error(selection.Selection(model, batch, granularity="row").scores(), expected) < 1e-5
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_peak_counts_memory_that_is_allocated_at_the_same_time():
    def call():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)
        torch.empty(2**21, dtype=torch.uint8)

    assert common.peak_mib(call) == pytest.approx(2, abs=0.01)
