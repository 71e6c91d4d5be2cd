"""``verify``, ``fggm inspect`` and the model card."""

from __future__ import annotations

import json
import re

import pytest
import torch
from command_line import fggm, succeed
from huggingface_hub import ModelCard
from models import adapted, llama, quantized, token_batches, train
from peft import PeftModel
from safetensors.torch import load_file, save_file

from fggm_peft import AdapterFileError, BaseMismatchError, ScoreMass, select_parameters
from fggm_peft.deltas import verify
from fggm_peft.tuner.files.model_card import write_card
from fggm_peft.tuner.files.reading import read_config

BATCHES = token_batches()
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    model = adapted(llama(), "element", criterion="random", density=0.05, task_type="CAUSAL_LM")
    train(model, BATCHES, steps=2)
    model.save_pretrained(tmp_path / "delta")
    return tmp_path / "delta"


def test_a_valid_adapter_is_described(adapter, base):
    result = verify(adapter, str(base))
    assert result["base"] == "matches" and verify(adapter)["base"] == "not checked"
    assert (result["granularity"], result["criterion"], result["format"]) == ("element", "random", 1)
    assert result["modules"] == 14 and result["density"] == pytest.approx(0.05, abs=1e-3) and not result["is_zero"]
    assert result["parameters"] == sum(t.numel() for key, t in load_file(adapter / FILE).items() if "values" in key)
    assert result["bytes"] == (adapter / FILE).stat().st_size > result["bound_bytes"]
    assert verify(adapter, llama(torch.bfloat16))["base"] == "matches"
    assert verify(adapter, quantized(llama(), "nf4"))["base"] == "matches"
    assert verify(adapter, PeftModel.from_pretrained(llama(), adapter))["base"] == "matches"
    assert json.loads(json.dumps(result)) == result


def test_more_than_ten_layers_are_verified_despite_the_sorted_keys_of_the_file(tmp_path):
    model = adapted(llama(layers=11, hidden_size=16, intermediate_size=16), density=0.1)
    select_parameters(model, BATCHES, progress=False)
    model.save_pretrained(tmp_path)
    assert verify(tmp_path)["modules"] == 11 * 7


def test_another_base_and_damaged_files_raise_errors(adapter, tmp_path):
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data += 0.01
    with pytest.raises(BaseMismatchError, match=r"layers\.0\.mlp\.up_proj differs"):
        verify(adapter, other)
    with pytest.raises(BaseMismatchError, match=r"another base"):
        verify(adapter, llama(hidden_size=32))
    tensors = load_file(adapter / FILE)
    key = next(key for key in tensors if key.endswith("indices"))
    save_file({**tensors, key: tensors[key][:-1].clone()}, adapter / FILE)
    with pytest.raises(AdapterFileError, match=re.escape(key.removeprefix("base_model.model."))):
        verify(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta_dtype": "bfloat16"}, "values are float32, not delta_dtype=bfloat16"),
        ({"support_sizes": {"model.layers.0.mlp.up_proj": 5}}, "differ from support_sizes"),
        ({"granularity": "row"}, "for 64 rows"),
    ],
)
def test_a_file_that_contradicts_its_config_is_rejected(change, message, adapter):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(AdapterFileError, match=message):
        verify(adapter)


def test_the_command_prints_a_description_or_a_one_line_error(adapter, base):
    result = succeed("inspect", adapter, "--base", base)
    assert result["base"] == "matches" and result["parameters"] > 0
    shown = fggm("inspect", adapter)
    assert shown.code == 0 and "is valid" in " ".join(shown.out.split()) and "bound bytes" in shown.out
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:-1])
    failed = fggm("inspect", adapter)
    assert failed.code == 1 and failed.err.startswith("fggm: error: ") and "is damaged" in failed.err
    assert fggm("inspect", base).code == 1


# The model card ----------------------------------------------------------------------------------


def test_the_card_contains_what_the_hub_and_readers_need(tmp_path):
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/a-model"
    model = adapted(base, threshold=ScoreMass(0.5), task_type="CAUSAL_LM", delta_dtype="bfloat16")
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["base_model"] == "someone/a-model" and data["license"] == "unknown"
    assert {"fggm", "base_model:adapter:someone/a-model"} <= set(data["tags"])
    assert data["pipeline_tag"] == "text-generation"
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.startswith("import fggm_peft") and "'someone/a-model'" in code
    for words in ("score_mass", "8 samples", "regret", "rounded to bfloat16", "fggm_peft 0.", "torch "):
        assert words in card.text, words


def test_the_code_of_the_card_runs(adapter, base, monkeypatch):
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / CONFIG).write_text(json.dumps(config))
    write_card(adapter, read_config(adapter / CONFIG))
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("path or Hub id of this adapter", str(adapter)), names)
    assert names["model"].peft_config["default"].peft_type == "FGGM"
    assert "base_model" not in ModelCard.load(adapter / "README.md").data.to_dict(), "a folder has no name on the Hub"


def test_a_rewritten_card_keeps_the_text_of_its_author(adapter):
    path = adapter / "README.md"
    path.unlink()
    assert write_card(adapter, read_config(adapter / CONFIG)) == path
    text = path.read_text().replace("license: unknown", "license: mit") + "\nWritten by hand.\n"
    path.write_text("".join(["---\nlanguage: en\n", text.removeprefix("---\n")]))
    config = json.loads((adapter / CONFIG).read_text()) | {"criterion": "weight_magnitude"}
    (adapter / CONFIG).write_text(json.dumps(config))
    write_card(adapter, read_config(adapter / CONFIG))
    text = path.read_text()
    assert text.count("import fggm_peft") == 1 and "Written by hand." in text and "`weight_magnitude`" in text
    assert "`random`" not in text
    data = ModelCard.load(path).data.to_dict()
    assert data["license"] == "mit" and data["language"] == "en"


def test_saving_does_not_change_a_card_written_by_its_author(adapter):
    card = "---\nlibrary_name: peft\n---\nLoad it after `import fggm_peft`.\n"
    (adapter / "README.md").write_text(card)
    PeftModel.from_pretrained(llama(), adapter).save_pretrained(adapter)
    text = (adapter / "README.md").read_text()
    assert "Load it after `import fggm_peft`." in text and "replaced when the adapter is saved" not in text
