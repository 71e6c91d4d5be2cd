"""The adapter methods of transformers, on a model that PEFT has not wrapped."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import adapted, fggm_layers, llama, logits, token_batches, train
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from fggm_peft import (
    AdapterFileError,
    AdapterNotSelectedError,
    BaseMismatchError,
    FGGMConfig,
    ScoreMass,
    select_parameters,
)

BATCHES = token_batches()


def trained(granularity: str, dtype=torch.float32, **config):
    model = get_peft_model(llama(dtype), FGGMConfig(granularity=granularity, threshold=ScoreMass(0.4), **config))
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=2)
    return model


def assert_same_adapter(a, b):
    layers = fggm_layers(b, "default")
    for name, layer in fggm_layers(a, "default").items():
        other = layers[name]
        assert torch.equal(layer.fggm_indices["default"], other.fggm_indices["default"])
        assert torch.equal(layer.fggm_values["default"], other.fggm_values["default"])
        assert layer.fggm_values["default"].dtype == other.fggm_values["default"].dtype
        assert other.selected["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_adapter_restores_the_adapter_bit_exactly(granularity, dtype, tmp_path):
    model = trained(granularity, dtype)
    model.save_pretrained(tmp_path)
    plain = llama(dtype)
    plain.load_adapter(str(tmp_path))
    assert_same_adapter(model, plain)
    assert torch.equal(logits(plain, BATCHES[0]), logits(model, BATCHES[0]))
    assert not any(parameter.requires_grad for name, parameter in plain.named_parameters() if "fggm_" in name)
    plain.disable_adapters()
    assert torch.equal(logits(plain, BATCHES[0]), logits(llama(dtype), BATCHES[0]))
    plain.enable_adapters()
    assert torch.equal(logits(plain, BATCHES[0]), logits(model, BATCHES[0]))
    plain.delete_adapter("default")
    assert not fggm_layers(plain, "default")


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_values_have_the_training_dtype_of_the_config(dtype, trains, tmp_path):
    base = torch.bfloat16 if dtype == "float32" else torch.float32
    model = adapted(llama(base), training_dtype=dtype)
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=1)
    model.save_pretrained(tmp_path)
    plain, wrapped = llama(base), PeftModel.from_pretrained(llama(base), tmp_path, is_trainable=trains)
    plain.load_adapter(str(tmp_path), is_trainable=trains)
    assert_same_adapter(wrapped, plain)
    for layer in fggm_layers(plain, "default").values():
        values = layer.fggm_values["default"]
        assert values.dtype == getattr(torch, dtype or "float32") and values.requires_grad == trains


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_trainable_adapter_continues_training_without_a_selection(low_cpu_mem_usage, tmp_path):
    trained("row").save_pretrained(tmp_path)
    plain = llama()
    plain.load_adapter(str(tmp_path), is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    losses = train(plain, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_from_pretrained_accepts_an_adapter_folder(auto_class, granularity, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, FGGMConfig(granularity=granularity, target_modules=["q_proj", "up_proj"]))
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=2)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    loaded = auto_class.from_pretrained(tmp_path / "adapter")
    if auto_class is AutoModelForCausalLM:
        assert_same_adapter(model, loaded)
        assert torch.equal(logits(loaded, BATCHES[0]), logits(model, BATCHES[0]))


def test_an_adapter_of_add_adapter_trains_and_loads_with_peft_and_transformers(tmp_path, granularity):
    plain = llama()
    plain.add_adapter(FGGMConfig(granularity=granularity, density=0.2))
    with pytest.raises(AdapterNotSelectedError):
        plain.train()(**BATCHES[0])
    select_parameters(plain, BATCHES, progress=False)
    losses = train(plain, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]
    plain.save_pretrained(tmp_path)
    expected = logits(plain, BATCHES[0])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), BATCHES[0]), expected)
    other = llama()
    other.load_adapter(str(tmp_path), adapter_name="task")
    assert torch.equal(logits(other, BATCHES[0]), expected)
    assert plain.active_adapters() == ["default"] and other.active_adapters() == ["task"]


def test_a_model_can_contain_several_adapters(tmp_path):
    models = {kind: trained(kind) for kind in ("row", "element")}
    plain = llama()
    for kind, model in models.items():
        model.save_pretrained(tmp_path / kind)
        plain.load_adapter(str(tmp_path / kind), adapter_name=kind)
    for kind, model in models.items():
        plain.set_adapter(kind)
        assert torch.equal(logits(plain, BATCHES[0]), logits(model, BATCHES[0]))
    plain.set_adapter(["row", "element"])
    assert plain.active_adapters() == ["row", "element"]


def test_a_new_adapter_from_a_saved_config_requires_a_selection(tmp_path):
    trained("row").save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    assert config.support_sizes and max(config.support_sizes.values()) > 0
    model = get_peft_model(llama(), config)
    assert torch.equal(logits(model, BATCHES[0]), logits(llama(), BATCHES[0]))
    twin = copy.deepcopy(model)
    for unselected in (model, twin):
        with pytest.raises(AdapterNotSelectedError):
            unselected.train()(**BATCHES[0])
        report = select_parameters(unselected, BATCHES, progress=False)
        assert report.parameters == sum(p.numel() for p in unselected.parameters() if p.requires_grad)
        train(unselected, BATCHES, steps=1)


def test_an_unselected_adapter_is_saved_without_support_sizes(tmp_path):
    get_peft_model(llama(), FGGMConfig()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["support_sizes"] is None
    plain = llama()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, BATCHES[0]), logits(llama(), BATCHES[0]))


@pytest.mark.parametrize("change", [lambda t: t + 10_000, lambda t: t - 10_000, lambda t: t.flip(0), torch.zeros_like])
@pytest.mark.parametrize("kind", ["row", "column"])
def test_transformers_loader_rejects_invalid_indices(change, kind, tmp_path):
    trained(kind).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("fggm_indices"))
    save_file({**tensors, key: change(tensors[key])}, path)
    with pytest.raises(AdapterFileError, match=r"do not fit|not sorted and unique"):
        llama().load_adapter(str(tmp_path))


@pytest.mark.parametrize("change", [torch.zeros_like, lambda t: torch.full_like(t, 255)])
def test_transformers_loader_rejects_invalid_encoded_indices(change, tmp_path):
    trained("element").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("fggm_indices"))
    save_file({**tensors, key: change(tensors[key])}, path)
    with pytest.raises(AdapterFileError, match=r"bits are set|cannot hold|low bits"):
        llama().load_adapter(str(tmp_path))


@pytest.mark.parametrize("size", [10**9, -1, "x", 1.5, [2]])
def test_invalid_index_sizes_raise_an_error_before_allocating(size):
    path = "model.layers.0.mlp.up_proj"
    config = FGGMConfig(
        granularity="element",
        target_modules=["up_proj"],
    )
    config.support_sizes = {path: 5}
    config.index_bytes = {path: size}
    with pytest.raises(ValueError, match="do not encode"):
        get_peft_model(llama(), config)


def test_transformers_loader_rejects_another_base(tmp_path, granularity):
    trained(granularity).save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight *= 1.01  # the last weight of the model
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.mlp\.down_proj differs"):
        other.load_adapter(str(tmp_path))
    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    with pytest.warns(UserWarning, match="made for another base"):
        other.load_adapter(str(tmp_path), peft_config=config, adapter_name="anyway")


def test_an_adapter_waiting_for_its_tensors_can_be_copied_saved_and_loaded(tmp_path, granularity):
    model = trained(granularity)
    model.save_pretrained(tmp_path / "full")
    waiting = copy.deepcopy(get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path / "full")))
    waiting.save_pretrained(tmp_path / "empty")
    empty = PeftModel.from_pretrained(llama(), tmp_path / "empty")
    assert torch.equal(logits(empty, BATCHES[0]), logits(llama(), BATCHES[0]))
    set_peft_model_state_dict(waiting, load_file(tmp_path / "full" / "adapter_model.safetensors"))
    assert_same_adapter(model, waiting)
    assert waiting.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("size", [-1, 10**9, 1.5])
def test_invalid_support_sizes_raise_an_error_before_allocating(size):
    config = FGGMConfig(target_modules=["up_proj"])
    config.support_sizes = {"model.layers.0.mlp.up_proj": size}
    with pytest.raises(ValueError, match="does not fit the 96 of the weight"):
        get_peft_model(llama(), config)
