"""The commands on finished deltas, as a user runs them: inspect, overlap, diff, merge, export, rollback."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from command_line import fail, fggm, succeed
from example_deltas import adapter, saved_adapter
from models import byte_tokenizer, llama, logits, token_batches
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fggm_peft.deltas import SparseDelta, overlap
from fggm_peft.deltas.to_lora import required_rank
from fggm_peft.training.base_model import BaseModel

BATCH = token_batches()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base with a tokenizer in ``base``, and three adapters on it."""
    folder = tmp_path_factory.mktemp("sharing")
    base = llama(torch.bfloat16)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for seed, kind in enumerate(("row", "column", "element")):
        model = adapter(kind, seed, base=AutoModelForCausalLM.from_pretrained(folder / "base"))
        model.save_pretrained(folder / kind)
    return folder


def load(path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path)


def test_inspect(folder, granularity):
    found = succeed("inspect", folder / granularity)
    delta = SparseDelta.read(folder / granularity)
    assert (found["granularity"], found["parameters"]) == (granularity, delta.parameters)
    assert found["density"] == delta.density and found["base_model"] == str(folder / "base")
    assert found["lora_rank"] == max(map(required_rank, delta.modules.values()))
    norms = [float(module.values.double().norm()) for module in delta.modules.values()]
    assert found["norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)
    module = found["modules"]["model.layers.0.mlp.down_proj"]
    assert module["shape"] == [64, 96] and module["dtype"] == "float32"
    shown = fggm("inspect", folder / granularity)
    assert shown.code == 0 and "LoRA rank" in shown.out


def test_overlap(folder):
    names = [folder / kind for kind in ("row", "column", "element")]
    found = succeed("overlap", *names)
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        (str(a), str(b)) for a, b in itertools.combinations(names, 2)
    ]
    expected = overlap(names[1], names[2])
    pair = found["pairs"][2]
    assert {key: pair[key] for key in expected.total.to_dict()} == expected.total.to_dict()
    assert pair["modules"] == {path: module.to_dict() for path, module in expected.modules.items()}
    assert fggm("overlap", names[0]).code == 2
    assert fggm("overlap", *names, "--modules").out.count("down_proj") > fggm("overlap", *names).out.count("down_proj")


def test_merge_diff_and_rollback_agree_with_peft(folder, tmp_path):
    adapters = [word for kind in ("row", "column", "element") for word in ("-a", folder / kind)]
    merged, ledger = tmp_path / "merged", tmp_path / "ledger"
    found = succeed("merge", folder / "base", *adapters, "--output", merged, "--ledger", ledger)
    assert json.loads((merged / "merge_report.json").read_text())["survived"] == found["survived"]
    assert (merged / "tokenizer.json").exists()
    by_peft = load(folder / "base")
    for kind in ("row", "column", "element"):
        by_peft = PeftModel.from_pretrained(by_peft, folder / kind, check_base=False).merge_and_unload()
    assert torch.equal(logits(load(merged), BATCH), logits(by_peft, BATCH))

    found = succeed("diff", folder / "base", merged, "--output", tmp_path / "delta", "--granularity", "element")
    assert found["inexact_entries"] == 0 and found["modules"] == 6
    again = PeftModel.from_pretrained(load(folder / "base"), tmp_path / "delta").merge_and_unload()
    assert torch.equal(logits(again, BATCH), logits(by_peft, BATCH))

    found = succeed("rollback", ledger, "column", "--model", merged, "--output", tmp_path / "without")
    assert found["remaining"] == ["row", "element"]
    expected = load(folder / "base")
    for kind in ("row", "element"):
        expected = PeftModel.from_pretrained(expected, folder / kind, check_base=False).merge_and_unload()
    assert torch.equal(logits(load(tmp_path / "without"), BATCH), logits(expected, BATCH))
    shown = fggm("rollback", ledger, "row", "--model", tmp_path / "without", "-o", tmp_path / "one")
    assert shown.code == 0 and "Removed row" in shown.out
    assert succeed("rollback", ledger, "element")["output"] is None
    assert "no task 'row'" in fail("rollback", ledger, "row")


def test_a_rollback_without_original_entries_says_what_to_do(folder, tmp_path):
    arguments = ("-a", folder / "row", "-a", folder / "element", "-o", tmp_path / "merged")
    succeed("merge", folder / "base", *arguments, "--ledger", tmp_path / "ledger")
    (tmp_path / "ledger" / "originals.safetensors").unlink()
    arguments = ("--model", tmp_path / "merged", "-o", tmp_path / "without")
    assert "ledger.apply(base)" in fail("rollback", tmp_path / "ledger", "row", *arguments)


def test_a_quantized_base_is_not_merged(folder, tmp_path, monkeypatch):
    model = load(folder / "base")
    model.is_quantized = True
    monkeypatch.setattr(BaseModel, "load", lambda self: model)
    arguments = ("-a", folder / "row", "-o", tmp_path / "merged", "--ledger", tmp_path / "ledger")
    assert "base is quantized" in fail("merge", folder / "base", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_merge_that_fails_leaves_no_ledger(folder, tmp_path):
    adapters = ("-a", folder / "row", "-a", saved_adapter(tmp_path / "other", base=llama(hidden_size=32)))
    output, ledger = tmp_path / "merged", tmp_path / "ledger"
    assert "another base" in fail("merge", folder / "base", *adapters, "--output", output, "--ledger", ledger)
    assert not output.exists() and not ledger.exists()


def test_export(folder, tmp_path, granularity):
    found = succeed("export", folder / granularity, "--to", "lora", "--output", tmp_path / "lora")
    assert found["largest"] == succeed("inspect", folder / granularity)["lora_rank"]
    expected = PeftModel.from_pretrained(load(folder / "base").float(), folder / granularity)
    loaded = PeftModel.from_pretrained(load(folder / "base").float(), tmp_path / "lora")
    assert (logits(loaded, BATCH) - logits(expected, BATCH)).abs().max() < 1e-5
    assert "is not empty" in fail("export", folder / granularity, "--output", tmp_path / "lora")
    limited = ("export", folder / granularity, "-o", tmp_path / "lora", "--max-rank", 2, "--overwrite")
    assert "max_units=2" in fggm(*limited).err
    assert fggm("export", folder / granularity, "--to", "shira", "--max-rank", 2, "-o", tmp_path / "x").code == 2
    assert fggm("export", folder / granularity, "--to", "shira", "--equal-ranks", "-o", tmp_path / "x").code == 2
    assert fggm("export", folder / granularity, "--equal-ranks", "-o", tmp_path / "equal").code == 0
    assert fggm("export", folder / granularity).code == 2
    assert fggm("export", folder / granularity, "--to", "gguf", "-o", tmp_path).code == 2


def test_errors_are_one_line(folder, tmp_path):
    assert "no adapter in" in fail("inspect", tmp_path)
    assert "no ledger in" in fail("rollback", tmp_path, "task")
    assert "there is no difference" in fail("diff", folder / "base", folder / "base", "-o", tmp_path / "delta")
    other = saved_adapter(tmp_path / "other", base=llama(hidden_size=32))
    arguments = ("-a", other, "-o", tmp_path / "merged")
    assert "was made for another base" in fail("merge", folder / "base", *arguments)
    assert (
        fggm("merge", folder / "base", "-a", folder / "row", "-o", tmp_path / "m", "--quantization", "4bit").code == 2
    )
    assert not (tmp_path / "merged").exists()
    assert fggm("rollback", tmp_path, "task", "--model", "somewhere").code == 1
