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
        pair = result.modules[name][0][1]
        assert pair.jaccard == pytest.approx(float(there.sum() / (in_a | in_b).sum()))
        both, either = both + float(there.sum()), either + float((in_a | in_b).sum())
        expected += float(in_a.sum()) * float(in_b.sum()) / in_a.numel()
        x.append(dense(a)[name][there])
        y.append(dense(b)[name][there])
    total = result.total[0][1]
    assert total.jaccard == pytest.approx(both / either)
    assert total.chance == pytest.approx(expected / (both + either - expected))
    cosine = torch.nn.functional.cosine_similarity(torch.cat(x), torch.cat(y), dim=0)
    assert total.cosine == pytest.approx(float(cosine))
    assert result.matrix("jaccard")[0][0] == result.matrix("jaccard")[1][1] == 1.0
    assert result.matrix("jaccard")[0][1] == result.matrix("jaccard")[1][0]


def test_modules_of_only_one_delta_count_as_disjoint():
    a = SparseDelta.read(adapter("row", target_modules=["q_proj"]))
    b = SparseDelta.read(adapter("row", target_modules=["v_proj"]))
    total = overlap(a, b).total[0][1]
    assert (total.jaccard, total.cosine, total.both) == (0.0, None, 0.0)
    assert total.total == a.parameters + b.parameters


def test_folders_are_read_and_named(tmp_path):
    for name in ("one", "two"):
        saved_adapter(tmp_path / name, "row", seed=len(name) + (name == "two"))
    result = overlap(tmp_path / "one", tmp_path / "two")
    assert result.names == ["one", "two"] and "one, two: Jaccard" in str(result)
    data = result.to_dict()
    assert data["modules"]["model.layers.0.self_attn.q_proj"][0]["a"] == "one"
    assert data["jaccard"][0][1] == result.total[0][1].jaccard
    assert len(result.table().rows) == 1 and len(result.table(by_module=True).rows) == 1 + len(data["modules"])


def test_an_overlap_requires_two_deltas_of_one_base():
    delta = SparseDelta.read(adapter("row"))
    with pytest.raises(ValueError, match="two deltas or more"):
        overlap(delta)
    with pytest.raises(ValueError, match="names"):
        overlap(delta, delta, names=["one"])
    with pytest.raises(ValueError, match="different base models"):
        overlap(delta, SparseDelta.read(adapter("row", base=llama(hidden_size=32))))
