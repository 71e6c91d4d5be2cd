"""The exact difference of two models, from models and from sharded checkpoints."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from example_deltas import ALL, mask_of
from models import bert, gpt2, llama, logits, token_batches
from peft import PeftModel
from reference import TOLERANCE, relative_error, seeded
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from fggm_peft.core.granularity import Rows
from fggm_peft.deltas import SparseDelta, apply_deltas, diff

BATCH = token_batches()[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def changed(base: nn.Module, granularity: str, modules: list[str], amount: float = 0.3) -> nn.Module:
    """A copy of the model with changes to some units of some weights."""
    tuned = copy.deepcopy(base)
    generator = seeded(3)
    with torch.no_grad():
        for name in modules:
            weight = tuned.get_submodule(name).weight
            noise = torch.randn(weight.shape, generator=generator) * amount
            keep = torch.rand(weight.shape, generator=generator) < 0.1
            if granularity == "row":
                keep = (torch.rand(len(weight), 1, generator=generator) < 0.3).expand_as(weight)
            if granularity == "column":
                keep = (torch.rand(1, weight.shape[1], generator=generator) < 0.3).expand_as(weight)
            weight += torch.where(keep, noise, 0.0).to(weight.dtype)
    return tuned


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ALL)
def test_the_base_plus_the_difference_is_bit_exactly_the_tuned_model(kind, dtype):
    base = llama(dtype)
    tuned = changed(base, kind, NAMES)
    delta = diff(base, tuned)
    assert str(delta.config.granularity) == kind  # the granularity with the smallest file
    assert list(delta.modules) == NAMES
    for name in NAMES:
        differs = base.get_submodule(name).weight != tuned.get_submodule(name).weight
        assert mask_of(delta, name)[differs].all()
        assert delta.modules[name].values.dtype == torch.float32
    if not delta.config.selection["inexact_entries"]:
        apply_deltas(base, [delta])
        assert same_weights(base, tuned)
    else:  # some float32 entries cannot be reached by adding a float32 value
        assert dtype == torch.float32 and delta.config.selection["inexact_entries"] < 0.01 * delta.parameters


def test_inexact_entries_are_counted():
    base = nn.Sequential(nn.Linear(2, 1, bias=False))
    base[0].weight.data[:] = torch.tensor([[1.0, 1.0]])
    tuned = copy.deepcopy(base)
    tuned[0].weight.data[:] = torch.tensor([[1e-9, 1.5]])  # no float32 value plus 1 rounds to 1e-9
    with pytest.warns(UserWarning, match="1 entries"):
        delta = diff(base, tuned, "element")
    assert delta.config.selection["inexact_entries"] == 1
    apply_deltas(base, [delta])
    assert base[0].weight[0, 1] == 1.5 and base[0].weight[0, 0].abs() < 1e-7


@pytest.mark.parametrize("granularity", ALL)
def test_the_granularity_can_be_given(granularity):
    base = llama(torch.bfloat16)
    tuned = changed(base, "element", NAMES)
    delta = diff(base, tuned, granularity)
    assert str(delta.config.granularity) == granularity and delta.config.selection["inexact_entries"] == 0
    apply_deltas(base, [delta])
    assert same_weights(base, tuned)


def test_checkpoints_are_read_shard_by_shard(tmp_path, monkeypatch):
    base = llama(torch.bfloat16)
    tuned = changed(base, "row", NAMES)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no model is loaded
    delta = diff(tmp_path / "base", str(tmp_path / "tuned"))
    assert delta.config.base_model_name_or_path == str(tmp_path / "base")
    assert delta.config.task_type == "CAUSAL_LM"
    folder = delta.save(tmp_path / "delta")
    adapted = PeftModel.from_pretrained(llama(torch.bfloat16), folder)
    assert relative_error(logits(adapted, BATCH), logits(tuned, BATCH)) < TOLERANCE[torch.bfloat16]
    assert same_weights(adapted.merge_and_unload(), tuned)


def test_norms_and_biases_are_stored_whole(tmp_path):
    base = llama(torch.bfloat16, attention_bias=True)
    tuned = changed(base, "row", NAMES)
    with torch.no_grad():
        tuned.model.norm.weight += 0.5
        tuned.model.layers[0].self_attn.k_proj.bias[3] += 0.25
        tuned.model.layers[0].self_attn.q_proj.bias[5:9] -= 1
    delta = diff(base, tuned)
    assert str(delta.config.granularity) == "row"
    assert delta.config.bias == "all"
    assert all("norm" in name or name.endswith(".bias") for name in delta.others)
    adapted = PeftModel.from_pretrained(llama(torch.bfloat16, attention_bias=True), delta.save(tmp_path / "delta"))
    merged = adapted.merge_and_unload().to(torch.bfloat16)  # PEFT stores modules_to_save in float32
    assert same_weights(merged, tuned)
    apply_deltas(base, [delta])
    assert same_weights(base, tuned)


def test_a_tied_embedding_is_counted_once_and_reported():
    base = llama(torch.bfloat16, tie_word_embeddings=True)
    tuned = changed(base, "row", ["model.embed_tokens"])
    with pytest.warns(UserWarning, match="shares its weight with lm_head"):
        delta = diff(base, tuned)
    assert list(delta.modules) == ["model.embed_tokens"]
    apply_deltas(base, [delta])
    assert torch.equal(logits(base, BATCH), logits(tuned, BATCH))


@pytest.mark.parametrize("build", [gpt2, lambda: bert(BertForSequenceClassification, num_labels=3)])
def test_other_model_types(build, tmp_path):
    base = build().to(torch.bfloat16)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for number, parameter in enumerate(tuned.parameters()):
            if number % 3 == 0:
                parameter.view(-1)[:: number + 2] += 0.5
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    delta = diff(tmp_path / "base", tmp_path / "tuned")
    again = SparseDelta.read(delta.save(tmp_path / "delta"))
    apply_deltas(base, [again])
    assert same_weights(base, tuned)


def test_incompatible_models_are_rejected(tmp_path):
    base = llama()
    with pytest.raises(ValueError, match="there is no difference"):
        diff(base, copy.deepcopy(base))
    with pytest.raises(ValueError, match="not a base and its fine-tuned model"):
        diff(base, llama(hidden_size=32))
    with pytest.raises(ValueError, match=r"has no model\.embed_tokens\.weight"):
        diff(base, gpt2())
    with pytest.raises(ValueError, match="unknown granularity"):
        diff(base, base, "rows")
    only_norm = copy.deepcopy(base)
    only_norm.model.norm.weight.data += 1
    with pytest.raises(ValueError, match="must change a weight matrix"):
        diff(base, only_norm)
    broken = copy.deepcopy(base)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        diff(base, broken)
    with pytest.raises(FileNotFoundError, match="Pickled weights"):
        diff(base, tmp_path)
    base.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    next((tmp_path / "shards").glob("model-00002-*")).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        diff(base, tmp_path / "shards")


OWN = {
    "an untied head": ({"tie_word_embeddings": True}, {}, "lm_head.weight"),
    "another layer": ({}, {"layers": 3}, r"model\.layers\.2\.\w+"),
    "biases": ({}, {"attention_bias": True}, r"model\.layers\.0\.self_attn\.\w_proj\.bias"),
    "other biases": ({}, {"mlp_bias": True}, r"mlp\.\w+\.bias"),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("in_files", [False, True], ids=["models", "files"])
def test_a_tensor_that_only_the_tuned_model_has_is_an_error(kind, in_files, tmp_path):
    of_base, of_tuned, name = OWN[kind]
    base, tuned = llama(**of_base), llama(**of_tuned)
    with torch.no_grad():
        for key, tensor in base.state_dict().items():
            tuned.state_dict()[key].copy_(tensor)
        if kind == "an untied head":
            tuned.lm_head.weight[3] += 1
        tuned.model.layers[0].mlp.up_proj.weight[2] += 1
    if in_files:
        for key, model in (("base", base), ("tuned", tuned)):
            model.save_pretrained(tmp_path / key)
        base, tuned = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(ValueError, match=f" has a .*{name}.* of its own: "):
        diff(base, tuned)


@pytest.mark.parametrize(("of_base", "is_error"), [(None, True), (1.0, False), (2.0, True)])
def test_a_tensor_in_a_file_that_the_model_does_not_use_must_be_equal(of_base, is_error, tmp_path):
    base = llama()
    for name, model, number in (("base", base, of_base), ("tuned", changed(base, "row", NAMES), 1.0)):
        model.save_pretrained(tmp_path / name)
        own = {} if number is None else {"packed": torch.tensor([number])}
        tensors = load_file(tmp_path / name / "model.safetensors") | own
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="has a packed of its own: a del") if is_error else nullcontext():
        assert list(diff(tmp_path / "base", tmp_path / "tuned").modules) == NAMES


def test_an_untied_head_with_the_shared_weight_is_no_difference(tmp_path):
    base, tuned = llama(tie_word_embeddings=True), llama()
    for key, tensor in base.state_dict().items():
        tuned.state_dict()[key].copy_(tensor)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[2] += 1
    delta = diff(base, tuned)
    assert list(delta.modules) == ["model.layers.0.mlp.up_proj"] and not delta.config.selection["config_differences"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rms_norm_eps", 0.1), ("hidden_act", "gelu"), ("max_position_embeddings", 99), ("rope_parameters", None)],
)
def test_different_settings_of_the_models_are_named(setting, value, tmp_path):
    base, tuned = llama(), changed(llama(), "row", NAMES)
    setattr(tuned.config, setting, value or {**tuned.config.rope_parameters, "rope_theta": 5.0})
    tuned.save_pretrained(tmp_path)
    for other in (tuned, tmp_path):
        with pytest.warns(UserWarning, match=f"differ in {setting}, which a delta does not change"):
            assert diff(base, other).config.selection["config_differences"] == [setting]


def test_a_granularity_that_does_not_fit_a_weight_is_rejected(monkeypatch):
    base, tuned = llama(), llama()
    tuned.model.layers[0].mlp.up_proj.weight.data += 1
    monkeypatch.setattr(Rows, "supports", lambda self, shape: False)
    with pytest.raises(ValueError, match=r"granularity='row' does not fit model.layers.0.mlp.up_proj, whose weight"):
        diff(base, tuned, "row")
