"""The ledger: tasks are merged in order, and any of them can be rolled back bit exactly."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from example_deltas import adapter, saved_adapter
from models import QUANTIZATIONS, gpt2, llama, logits, quantized, token_batches
from torch import nn

from fggm_peft import AdapterFileError
from fggm_peft.deltas import Ledger, SparseDelta, apply_deltas
from fggm_peft.tuner.hosts.bitsandbytes import guard_four_bit_layers

BATCH = token_batches()[0]
TASKS = ["first", "second", "third"]
MIXED = ["row", "column", "element"]


def filled(folder, kinds, build=llama, **config) -> Ledger:
    """A ledger of three tasks with overlapping supports."""
    ledger = Ledger(folder)
    for seed, (name, kind) in enumerate(zip(TASKS, kinds, strict=True)):
        ledger.add(name, SparseDelta.read(adapter(kind, seed, base=build(), density=0.4, **config)))
    return ledger


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


def without(ledger: Ledger, task: str, base: nn.Module) -> nn.Module:
    apply_deltas(base, [ledger.delta(name) for name in TASKS if name != task])
    return base


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_task_is_rolled_back_bit_exactly(task, dtype, mixed, granularity, tmp_path):
    ledger = filled(tmp_path, MIXED if mixed else [granularity] * 3)
    model = llama(dtype)
    report = ledger.apply(model)
    assert 0.8 < report.survived < 1.2 and not same_weights(model, llama(dtype))
    expected = without(ledger, task, llama(dtype))
    Ledger(tmp_path).rollback(task, model)  # a new ledger object needs only the folder
    assert same_weights(model, expected)
    assert Ledger(tmp_path).tasks == [name for name in TASKS if name != task]


@pytest.mark.parametrize("order", [TASKS, TASKS[::-1]])
def test_rolling_back_all_tasks_restores_the_base(order, tmp_path):
    ledger = filled(tmp_path, MIXED)
    model = llama(torch.bfloat16)
    ledger.apply(model)
    for task in order:
        ledger.rollback(task, model)
    assert same_weights(model, llama(torch.bfloat16)) and ledger.tasks == []


def test_transposed_weights_are_rolled_back(tmp_path):
    ledger = filled(tmp_path, ["row"] * 3, gpt2, target_modules=["c_attn", "c_fc"])
    model = gpt2()
    ledger.apply(model)
    expected = without(ledger, "second", gpt2())
    ledger.rollback("second", model)
    assert same_weights(model, expected)


def test_without_originals_the_ledger_is_applied_to_the_base_again(tmp_path):
    ledger = filled(tmp_path, MIXED)
    model = llama(torch.bfloat16)
    ledger.apply(model)
    (tmp_path / "originals.safetensors").unlink()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"no original entries of .*ledger\.remove\(task\); ledger\.apply\(base\)"):
        ledger.rollback("first", model)
    assert same_weights(model, before) and ledger.tasks == TASKS
    expected = without(ledger, "first", llama(torch.bfloat16))
    ledger.remove("first")
    model = llama(torch.bfloat16)
    ledger.apply(model)
    assert same_weights(model, expected)


def test_the_ledger_keeps_the_task_until_the_model_is_saved(tmp_path):
    ledger = filled(tmp_path, MIXED)
    model = llama()
    ledger.apply(model)
    ledger.rollback("first", model, remove=False)
    assert ledger.tasks == TASKS and same_weights(model, without(ledger, "first", llama()))
    with pytest.raises(ValueError, match="ledger's tasks merged in order"):
        ledger.rollback("second", model)


def test_a_model_that_does_not_match_the_ledger_is_not_changed(tmp_path):
    ledger = filled(tmp_path, MIXED)
    model = llama()
    ledger.apply(model)
    model.model.layers[1].mlp.down_proj.weight.data += 1
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="is not that of the base with the ledger's tasks"):
        ledger.rollback("first", model)
    assert same_weights(model, before) and ledger.tasks == TASKS


def test_a_merged_model_is_rejected_as_base(tmp_path):
    ledger = filled(tmp_path, MIXED)
    model = llama()
    ledger.apply(model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="belongs to another base"):
        ledger.apply(model)
    assert same_weights(model, before)
    with pytest.raises(TypeError, match="has adapters"):
        ledger.apply(adapter("row"))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_base_stores_the_tasks_in_its_sidecar(kind, tmp_path):
    ledger = filled(tmp_path, MIXED, target_modules=["q_proj", "down_proj"])
    base, model = quantized(llama(), kind), quantized(llama(), kind)
    untouched = quantized(llama(), kind)
    guard_four_bit_layers(untouched)  # bitsandbytes' CPU kernel does not support odd widths
    bare = logits(untouched, BATCH)
    ledger.apply(model)
    assert not torch.equal(merged := logits(model, BATCH), bare)
    with pytest.raises(ValueError, match="belongs to another base"):
        ledger.apply(model)
    assert torch.equal(logits(model, BATCH), merged)
    expected = logits(without(ledger, "second", base), BATCH)
    ledger.rollback("second", model)
    assert torch.equal(logits(model, BATCH), expected)
    for task in ("first", "third"):
        ledger.rollback(task, model)
    assert torch.equal(logits(model, BATCH), bare)


def test_order_and_digests_are_verified(tmp_path):
    ledger = filled(tmp_path, MIXED)
    assert Ledger(tmp_path).tasks == TASKS
    (tmp_path / "deltas" / "first" / "adapter_model.safetensors").write_bytes(b"something else")
    with pytest.raises(AdapterFileError, match=r"'first'.*has changed since it was added"):
        ledger.delta("first")
    with pytest.raises(AdapterFileError, match="has changed since it was added"):
        ledger.apply(llama())


def test_a_name_can_be_reused_after_a_rollback(tmp_path):
    ledger = filled(tmp_path, MIXED)
    with pytest.raises(ValueError, match="has a task 'First' already"):
        ledger.add("First", adapter("row"))
    ledger.remove("first")
    ledger.add("first", saved_adapter(tmp_path / "new", "column", seed=7))
    assert ledger.tasks == ["second", "third", "first"]
    assert len(list((tmp_path / "deltas").iterdir())) == 3
    assert [len(ledger.delta(task).modules) for task in ledger.tasks] == [6, 6, 6]


def test_invalid_tasks_are_rejected(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    for name in ("", "../up", ".hidden", "a/b", "two words"):
        with pytest.raises(ValueError, match="name"):
            ledger.add(name, adapter("row"))
    with pytest.raises(ValueError, match="whole tensors"):
        ledger.add("task", adapter("row", modules_to_save=["model.norm"]))
    with pytest.raises(ValueError, match="no task 'other'"):
        ledger.remove("other")
    with pytest.raises(ValueError, match="no task in"):
        ledger.apply(llama())
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([{"task": None}], "is damaged"),
        ({"format": "other"}, "format 'other'"),
        ({"format": "fggm_ledger 1", "tasks": [{"name": 1}]}, "is damaged"),
        ("no JSON", "is damaged"),
    ],
)
def test_a_damaged_ledger_raises_an_error(written, message, tmp_path):
    (tmp_path / "ledger.json").write_text(written if isinstance(written, str) else json.dumps(written))
    with pytest.raises(ValueError, match=message):
        Ledger(tmp_path)


def test_a_folder_outside_the_ledger_is_never_removed(tmp_path):
    ledger = filled(tmp_path / "ledger", MIXED)
    written = json.loads((tmp_path / "ledger" / "ledger.json").read_text())
    written["tasks"]["../precious"] = written["tasks"]["first"]
    (tmp_path / "ledger" / "ledger.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="is damaged"):
        Ledger(ledger.folder)
