"""Sums, differences and pruning of deltas, against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from example_deltas import ALL, PAIRS, adapter, dense, mask_of
from models import llama, logits, token_batches
from peft import PeftModel
from reference import relative_error

from fggm_peft.deltas import SparseDelta, compose, prune

BATCH = token_batches()[0]


@pytest.fixture(scope="module")
def deltas() -> dict[tuple[str, int], SparseDelta]:
    return {
        (granularity, seed): SparseDelta.read(
            adapter(granularity, seed, target_modules=["q_proj", "v_proj"] if seed % 2 else ["v_proj", "down_proj"])
        )
        for granularity in ALL
        for seed in range(3)
    }


def summed(parts: list[tuple[SparseDelta, float]]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for delta, weight in parts:
        for name, matrix in dense(delta).items():
            total[name] = total.get(name, 0) + weight * matrix
    return total


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_weighted_sum_agrees_with_the_dense_sum(first, second, deltas):
    parts = [(deltas[first, 0], 0.5), (deltas[second, 1], -2.0), (deltas[first, 2], 1.0)]
    result = compose([delta for delta, _ in parts], [weight for _, weight in parts])
    expected = summed(parts)
    found = dense(result)
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-6
    assert str(result.config.granularity) == (first if first == second else "element")
    for name in expected:
        union = torch.zeros_like(expected[name], dtype=torch.bool)
        for delta, _ in parts:
            if name in delta.modules:
                union |= mask_of(delta, name)
        assert torch.equal(mask_of(result, name), union)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_difference_plus_its_subtrahend_gives_the_minuend(first, second, deltas):
    a, b = deltas[first, 0], deltas[second, 1]
    back = compose([a - b, b])
    expected = dense(a)
    for name, matrix in dense(back).items():
        assert (matrix - expected.get(name, torch.zeros_like(matrix))).abs().max() < 1e-7


def test_a_sum_loads_with_peft_and_computes_like_both_adapters(tmp_path, deltas):
    for name, seed in (("row", 0), ("column", 1)):
        deltas[name, seed].save(tmp_path / name)
    compose([tmp_path / "row", tmp_path / "column"]).save(tmp_path / "both")
    model = PeftModel.from_pretrained(llama(), tmp_path / "row", adapter_name="row")
    model.load_adapter(tmp_path / "column", "column")
    model.base_model.set_adapter(["row", "column"])
    together = logits(model, BATCH)
    both = logits(PeftModel.from_pretrained(llama(), tmp_path / "both"), BATCH)
    assert relative_error(both, together) < 1e-5
    assert "compose" in (tmp_path / "both" / "README.md").read_text()


def test_incompatible_deltas_are_rejected():
    rows = SparseDelta.read(adapter("row"))
    with pytest.raises(ValueError, match="different base models"):
        compose([rows, SparseDelta.read(adapter("row", base=llama(hidden_size=32)))])
    with pytest.raises(ValueError, match="one weight for each delta"):
        compose([rows], [1.0, 2.0])
    whole = SparseDelta.read(adapter("row", modules_to_save=["norm"]))
    with pytest.raises(ValueError, match="whole tensor"):
        compose([rows, whole])


def test_equal_whole_modules_are_retained(tmp_path):
    a, b = (SparseDelta.read(adapter("row", seed, modules_to_save=["norm"])) for seed in (0, 1))
    folder = compose([a, b]).save(tmp_path / "sum")
    assert set(PeftModel.from_pretrained(llama(), folder).peft_config["default"].modules_to_save) == {"norm"}


@pytest.mark.parametrize("granularity", ALL)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("density", [0.01, 0.07, 1.0])
def test_pruning_keeps_the_largest_units(granularity, scope, density, deltas):
    delta = deltas[granularity, 0]
    if scope == "layer" and density == 0.01 and granularity != "element":
        with pytest.raises(ValueError, match="no unit of the delta is left"):
            prune(delta, density)
        return
    result = prune(delta, density, scope)
    groups = [[name] for name in delta.modules] if scope == "layer" else [list(delta.modules)]
    for names in groups:
        budget = round(density * sum(delta.modules[n].shape[0] * delta.modules[n].shape[1] for n in names))
        held = []
        for name in names:
            module = delta.modules[name]
            dim = module.granularity.unit_dim
            for position in range(len(module.indices)):
                values = module.values.double().select(dim, position).reshape(-1)
                held.append((float(values.square().mean()), name, int(module.indices[position]), values.numel()))
        held.sort(key=lambda unit: -unit[0])
        expected: set[tuple[str, int]] = set()
        for _, name, index, cost in held:
            if cost > budget:
                break
            budget -= cost
            expected.add((name, index))
        found = {(n, int(i)) for n in names for i in result.modules[n].indices}
        assert found == expected
        for name in names:
            kept = mask_of(result, name)
            assert torch.equal(dense(result)[name], torch.where(kept, dense(delta)[name], 0.0))


def test_invalid_densities_and_scopes_are_rejected():
    delta = SparseDelta.read(adapter("row"))
    for density in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="density"):
            prune(delta, density)
    with pytest.raises(ValueError, match="scope"):
        prune(delta, 0.5, "model")
