"""Merging deltas into a base without PEFT, and exporting merged checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from example_deltas import adapter, dense, saved_adapter
from models import fggm_layers, gpt2, llama, token_batches
from peft import PeftConfig, PeftModel, get_peft_model

from fggm_peft.deltas import SparseDelta, apply_deltas

BATCH = token_batches()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_equals_merge_and_unload(granularity, dtype, tmp_path):
    folder = saved_adapter(tmp_path / "delta", granularity)
    expected = PeftModel.from_pretrained(llama(dtype), folder).merge_and_unload().state_dict()
    model = llama(dtype)
    report = apply_deltas(model, [folder])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert {module.outcome for module in report.modules} == {"added"}
    assert report.survived == pytest.approx(1, abs=0.05)


def test_an_embedding_saved_with_the_adapter_does_not_overwrite_the_merge(granularity, tmp_path):
    targets = ["embed_tokens", "q_proj"]
    folders = [saved_adapter(tmp_path / str(seed), granularity, seed, target_modules=targets) for seed in (0, 1)]
    assert any(".base_layer." in key for key in SparseDelta.read(folders[0]).others)
    expected, model = llama(), llama()
    for folder in folders:
        config = PeftConfig.from_pretrained(folder)
        with_adapter = get_peft_model(expected, config)
        deltas = SparseDelta.read(folder).modules
        for name, layer in fggm_layers(with_adapter, "default").items():
            layer.set_support("default", deltas[name].indices)
            layer.fggm_values["default"].data.copy_(deltas[name].values)
        expected = with_adapter.merge_and_unload()
        apply_deltas(model, [folder])
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_merging_into_a_tied_weight_warns_that_both_layers_change(targets):
    base = llama(tie_word_embeddings=True)
    delta = SparseDelta.read(adapter("row", base=copy.deepcopy(base), target_modules=["q_proj", *targets]))
    with pytest.warns(UserWarning, match="shares its weight with .* changes both") as warned:
        apply_deltas(base, [delta])
    message = str(next(w.message for w in warned if "shares its weight" in str(w.message)))
    changed = message.partition("changes only ")[2]
    assert sorted(path.rpartition(".")[2] for path in changed.split(" and ")) == sorted(targets)


def test_apply_supports_every_layer_type(granularity, example, adapt):
    layer = example.layer()
    base = torch.nn.Sequential()
    base.add_module("layer", copy.deepcopy(layer))
    delta = SparseDelta.read(adapt(layer, granularity=granularity))
    before = base.layer.weight.detach().clone()
    apply_deltas(base, [delta])
    model = adapt(copy.deepcopy(layer), granularity=granularity)
    change = model.base_model.model.layer.unmatrix(dense(delta)["layer"].to(before.dtype))
    assert torch.allclose(base.layer.weight, before + change, atol=1e-6)


def test_a_base_with_other_weights_is_a_warning(tmp_path, recwarn):
    delta = saved_adapter(tmp_path / "delta", base=llama())
    apply_deltas(llama(), [delta])
    assert not any("another base" in str(warning.message) for warning in recwarn)
    other = llama()
    other.model.layers[0].mlp.down_proj.weight.data += 1
    with pytest.warns(UserWarning, match="trained on another base.*layers.0.mlp.down_proj differs"):
        apply_deltas(other, [delta])


def test_an_incompatible_base_is_not_changed(tmp_path):
    folder = saved_adapter(tmp_path / "delta")
    with pytest.raises(ValueError, match="not an adaptable layer here"):
        apply_deltas(gpt2(), [folder])
    with pytest.raises(TypeError, match="has adapters"):
        apply_deltas(adapter("row"), [folder])
    broken = adapter("row", seed=1)
    next(p for n, p in broken.named_parameters() if "fggm_values" in n).data[0, 0] = float("inf")
    model = llama()
    with pytest.raises(ValueError, match="NaN or infinite"):
        apply_deltas(model, [folder, SparseDelta.read(broken)])
    with pytest.raises(ValueError, match="was made for another base"):
        apply_deltas(model, [folder, SparseDelta.read(adapter("row", base=llama(hidden_size=32)))])
    state = llama().state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
