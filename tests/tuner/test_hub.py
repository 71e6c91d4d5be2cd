"""Publishing on the Hub and loading from it, with PEFT's mixin and with functions that accept Hub ids."""

from __future__ import annotations

import os
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from command_line import fail, succeed
from example_deltas import adapter
from hub_stand_in import TOKEN
from huggingface_hub import ModelCard
from models import fggm_layers, logits, text_model, token_batches
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from fggm_peft import AdapterFileError, BaseMismatchError, FGGMConfig, Ledger, overlap
from fggm_peft.deltas import SparseDelta, verify

BATCH = token_batches((3,))[0]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def pushed(name: str, granularity: str = "row", seed: int = 0, base: nn.Module | None = None, **push) -> PeftModel:
    model = adapter(granularity, seed, text_model() if base is None else base)
    model.push_to_hub(name, **push)
    return model


@pytest.fixture
def base(hub):
    """The base model "me/base" on the Hub."""
    text_model().push_to_hub("me/base")
    return LlamaForCausalLM.from_pretrained("me/base")


# PEFT's mixin ------------------------------------------------------------------------------------


def test_a_pushed_adapter_loads_bit_exactly_by_its_id(granularity, hub):
    model = pushed("me/delta", granularity)
    assert hub.files("me/delta").keys() == FILES
    loaded = PeftModel.from_pretrained(text_model(), "me/delta")
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))
    large = [request for request in hub.requests if "/large/" in request]
    assert [request.split()[0] for request in large] == [
        "PUT",
        "GET",
    ]  # the tensor file is uploaded and downloaded once, separately


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    first = pushed("me/delta", seed=1)
    commit = huggingface_hub.model_info("me/delta").sha
    huggingface_hub.create_tag("me/delta", tag="v1")
    second = pushed("me/delta", seed=2)
    third = pushed("me/delta", seed=3, revision="next")
    assert {ref.name for ref in huggingface_hub.list_repo_refs("me/delta").branches} == {"main", "next"}
    for revision, model in {"v1": first, commit: first, "main": second, None: second, "next": third}.items():
        loaded = PeftModel.from_pretrained(text_model(), "me/delta", revision=revision)
        assert torch.equal(logits(loaded, BATCH), logits(model, BATCH)), revision
        delta = SparseDelta.read("me/delta", revision=revision)
        path = "model.layers.0.self_attn.q_proj"
        assert torch.equal(delta.modules[path].values, fggm_layers(model, "default")[path].fggm_values["default"])


def test_the_base_and_its_revision_are_recorded_and_loaded(hub, base):
    huggingface_hub.create_tag("me/base", tag="v1")
    changed = text_model()
    changed.model.layers[0].self_attn.q_proj.weight.data += 0.01
    changed.push_to_hub("me/base")
    config = FGGMConfig(criterion="random", density=0.1, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, revision="v1")
    model.push_to_hub("me/delta")
    result = PeftConfig.from_pretrained("me/delta")
    assert (result.base_model_name_or_path, result.revision) == ("me/base", "v1")
    loaded = AutoPeftModelForCausalLM.from_pretrained("me/delta")
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))
    with pytest.raises(BaseMismatchError, match="me/base"):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("me/base"), "me/delta")


def test_a_private_delta_requires_the_token(hub, monkeypatch):
    model = pushed("me/delta", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="me/delta"):
        PeftModel.from_pretrained(text_model(), "me/delta")
    with pytest.raises(AdapterFileError, match="me/delta"):
        verify("me/delta")
    loaded = PeftModel.from_pretrained(text_model(), "me/delta", token=TOKEN)
    assert torch.equal(logits(loaded, BATCH), logits(model, BATCH))
    assert verify("me/delta", token=TOKEN)["modules"] == len(fggm_layers(model, "default"))


def test_a_cached_adapter_loads_offline(hub, monkeypatch):
    model = pushed("me/delta")
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        before = len(hub.requests)
        assert torch.equal(logits(PeftModel.from_pretrained(text_model(), "me/delta"), BATCH), logits(model, BATCH))
        assert SparseDelta.read("me/delta").modules.keys() == fggm_layers(model, "default").keys()
        assert (len(hub.requests) == before) == offline


def test_a_process_with_the_endpoint_in_its_environment_loads_an_adapter(hub, base, tmp_path):
    model = adapter("element", base=base)
    model.push_to_hub("me/delta")
    code = """
import fggm_peft, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("me/delta")
print(sum(float(p.abs().sum()) for n, p in model.named_parameters() if "fggm_values" in n))
"""
    environment = {**os.environ, **hub.environment(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    here = sum(p.detach().abs().sum().item() for name, p in model.named_parameters() if "fggm_values" in name)
    assert float(result.stdout.split()[-1]) == pytest.approx(here, rel=1e-6)


# Model cards -------------------------------------------------------------------------------------


def test_an_uploaded_folder_keeps_its_card(hub, base, tmp_path):
    adapter("row", base=base).save_pretrained(tmp_path / "delta")
    huggingface_hub.create_repo("me/delta")
    huggingface_hub.upload_folder(repo_id="me/delta", folder_path=tmp_path / "delta")
    assert hub.files("me/delta").keys() == FILES
    card = ModelCard.load("me/delta")
    assert (card.data.base_model, card.data.library_name) == ("me/base", "peft") and "fggm" in card.data.tags
    assert "import fggm_peft" in card.text
    model = adapter("row", seed=1, base=text_model())
    model.push_to_hub("me/delta")  # keeps the existing card
    assert ModelCard.load("me/delta").content == card.content


# Functions that accept a Hub id ------------------------------------------------------------------


def test_deltas_can_be_compared_verified_and_inspected_by_id(hub, base):
    models = {name: adapter("row", seed, base=text_model()) for seed, name in enumerate(("me/a", "me/b"))}
    for name, model in models.items():
        model.push_to_hub(name)
    result = overlap("me/a", "me/b")
    assert result.total == overlap(*models.values()).total
    assert verify("me/a", "me/base")["base"] == "matches"
    assert verify("me/a", revision="main")["adapter"] == "me/a"
    inspected = succeed("inspect", "me/a")
    assert inspected["adapter"] == "me/a" and inspected["modules"].keys() == SparseDelta.read("me/a").modules.keys()
    assert succeed("inspect", "me/a", "--base", "me/base")["base"] == "matches"
    assert succeed("overlap", "me/a", "me/b")["pairs"][0]["jaccard"] == result.total.jaccard


def test_an_adapter_on_the_hub_can_be_added_to_a_ledger(hub, tmp_path):
    earlier = pushed("me/earlier")
    ledger = Ledger(tmp_path / "ledger")
    ledger.add("earlier", "me/earlier")
    model = text_model()
    ledger.apply(model)
    assert torch.equal(logits(model, BATCH), logits(earlier.merge_and_unload(), BATCH))


WAYS = {
    "PEFT": lambda name, **hub: PeftModel.from_pretrained(text_model(), name, **hub),
    "verify": lambda name, **hub: verify(name, **hub),
    "SparseDelta": lambda name, **hub: SparseDelta.read(name, **hub),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_missing_id_raises_an_error_that_names_it(way, hub):
    with pytest.raises((ValueError, AdapterFileError), match="me/nothing"):
        WAYS[way]("me/nothing")
    huggingface_hub.create_repo("me/empty")
    with pytest.raises((ValueError, AdapterFileError), match="me/empty"):
        WAYS[way]("me/empty")
    pushed("me/delta")
    with pytest.raises((ValueError, AdapterFileError), match="me/delta"):
        WAYS[way]("me/delta", revision="v9")


def test_commands_report_a_missing_id_in_one_line(hub):
    assert "'me/nothing'" in fail("inspect", "me/nothing")
    assert "'me/nothing'" in fail("overlap", "me/nothing", "me/nothing")
    pushed("me/delta")
    assert "'me/base'" in fail("inspect", "me/delta", "--base", "me/base")
