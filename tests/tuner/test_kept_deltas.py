"""``quantized_merge="keep"`` merges finished deltas into one frozen sidecar of a quantized base."""

from __future__ import annotations

import pytest
import torch
from example_deltas import PAIRS, adapter
from models import QUANTIZATIONS, adapted, llama, logits, quantized, token_batches, train
from reference import relative_error

from fggm_peft.deltas import SparseDelta, compose
from fggm_peft.tuner.merging.sidecar import SIDECAR

BATCHES = token_batches()
KEEP = {"quantized_merge": "keep"}
LINEAR = ["q_proj", "v_proj", "down_proj"]


def sidecars(model) -> dict[str, object]:
    return {name: getattr(m, SIDECAR) for name, m in model.named_modules() if hasattr(m, SIDECAR)}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_sidecar_of_two_adapters_gives_the_same_output(first, second):
    model = adapter(first, 0, base=quantized(llama(), "nf4"), **KEEP)
    other = adapter(second, 1, **KEEP)
    model.add_adapter("second", other.peft_config["default"])
    for mine, theirs in zip(_layers(model), _layers(other), strict=True):
        mine.set_support("second", theirs.fggm_indices["default"])
        mine.fggm_values["second"].data.copy_(theirs.fggm_values["default"].data)
    model.base_model.set_adapter(["default", "second"])
    expected = logits(model, BATCHES[0])
    base = model.merge_and_unload()
    assert relative_error(logits(base, BATCHES[0]), expected) < 1e-5
    deltas = [SparseDelta.read(adapter(first, 0)), SparseDelta.read(other)]
    union = compose(deltas)
    for name, sidecar in sidecars(base).items():
        held = {delta.granularity.name: delta for delta in sidecar.deltas}
        assert set(held) == {first, second}
        if first == second:
            assert torch.equal(held[first].indices, union.modules[name].indices)
            assert torch.equal(held[first].values, union.modules[name].values)
        assert not any(tensor.requires_grad for tensor in sidecar.buffers())


def _layers(model):
    return [module for module in model.modules() if hasattr(module, "fggm_values")]


def test_memory_grows_with_the_union_of_the_supports_only(granularity):
    base, sizes = quantized(llama(), "nf4"), []
    for _ in range(3):
        base = adapter(granularity, 0, base=base, **KEEP).merge_and_unload()  # every task has the same support
        sizes.append(sum(t.numel() for sidecar in sidecars(base).values() for t in sidecar.buffers()))
    assert sizes[0] == sizes[1] == sizes[2]
    bigger = adapter(granularity, 5, base=base, **KEEP).merge_and_unload()
    assert sum(t.numel() for sidecar in sidecars(bigger).values() for t in sidecar.buffers()) > sizes[0]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_next_task_trains_on_a_base_with_a_sidecar(kind):
    base = adapter("row", 0, base=quantized(llama(), kind), **KEEP).merge_and_unload()
    before = logits(base, BATCHES[0])
    model = adapted(base, "row", criterion="random", density=0.3, target_modules=LINEAR, **KEEP)
    assert relative_error(logits(model, BATCHES[0]), before) < (0.05 if kind == "int8" else 1e-5)
    losses = train(model, BATCHES[:1], steps=6)
    assert losses[-1] < losses[0]
    trained = logits(model, BATCHES[0])
    assert relative_error(logits(model.merge_and_unload(), BATCHES[0]), trained) < (0.05 if kind == "int8" else 1e-5)
