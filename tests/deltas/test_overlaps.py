"""The overlap of deltas, against dense masks and matrices."""

from __future__ import annotations

import pytest
import torch
from example_deltas import ALL, PAIRS, adapter, dense, mask_of, saved_adapter
from models import llama

from fggm_peft.deltas import SparseDelta, overlap


@pytest.fixture(scope="module")
def deltas() -> dict[tuple[str, int], SparseDelta]:
    return {(kind, seed): SparseDelta.read(adapter(kind, seed, density=0.3)) for kind in ALL for seed in (0, 1)}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_jaccard_chance_and_cosine_agree_with_the_dense_matrices(first, second, deltas):
    a, b = deltas[first, 0], deltas[second, 1]
    result = overlap(a, b)
    both = either = expected = 0.0
    x, y = [], []
    for name in a.modules:
        in_a, in_b = mask_of(a, name), mask_of(b, name)
        there = in_a & in_b
        pair = result.modules[name]
        assert pair.jaccard == pytest.approx(float(there.sum() / (in_a | in_b).sum()))
        both, either = both + float(there.sum()), either + float((in_a | in_b).sum())
        expected += float(in_a.sum()) * float(in_b.sum()) / in_a.numel()
        x.append(dense(a)[name][there])
        y.append(dense(b)[name][there])
    total = result.total
    assert total.jaccard == pytest.approx(both / either)
    assert total.chance == pytest.approx(expected / (both + either - expected))
    cosine = torch.nn.functional.cosine_similarity(torch.cat(x), torch.cat(y), dim=0)
    assert total.cosine == pytest.approx(float(cosine))
    assert overlap(a, a).total.jaccard == 1.0
    assert overlap(b, a).total.jaccard == total.jaccard


def test_modules_of_only_one_delta_count_as_disjoint():
    a = SparseDelta.read(adapter("row", target_modules=["q_proj"]))
    b = SparseDelta.read(adapter("row", target_modules=["v_proj"]))
    total = overlap(a, b).total
    assert (total.jaccard, total.cosine, total.both) == (0.0, None, 0.0)
    assert total.total == a.parameters + b.parameters


def test_folders_are_read(tmp_path):
    folders = [saved_adapter(tmp_path / str(seed), "row", seed) for seed in (1, 2)]
    result = overlap(*folders)
    assert str(result).startswith("Jaccard 0.") and len(result.modules) == 6
    assert result.total.to_dict()["jaccard"] == result.total.jaccard


def test_an_overlap_requires_deltas_of_one_base():
    delta = SparseDelta.read(adapter("row"))
    with pytest.raises(ValueError, match="different base models"):
        overlap(delta, SparseDelta.read(adapter("row", base=llama(hidden_size=32))))
