"""``save_pretrained`` and loading: contents of the files, bit-exactness, and damaged files."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from models import fggm_layers, llama, logits, token_batches, train
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from fggm_peft import AdapterFileError, AdapterNotSelectedError, FGGMConfig, ScoreMass, select_parameters

BATCHES = token_batches()


def trained(granularity: str = "row", dtype=torch.float32, **config):
    model = get_peft_model(llama(dtype), FGGMConfig(granularity=granularity, **config))
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=2)
    return model


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_loads_bit_exactly(granularity, dtype, low_cpu_mem_usage, tmp_path):
    model = trained(granularity, dtype)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for (name, a), (_, b) in zip(
        fggm_layers(model, "default").items(), fggm_layers(loaded, "default").items(), strict=True
    ):
        assert torch.equal(a.fggm_values["default"], b.fggm_values["default"]), name
        assert torch.equal(a.fggm_indices["default"], b.fggm_indices["default"]), name
        assert b.fggm_values["default"].dtype == torch.float32
    assert torch.equal(logits(model, BATCHES[0]), logits(loaded, BATCHES[0]))


def test_the_file_contains_only_values_and_indices(granularity, tmp_path):
    model = trained(granularity)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {re.sub("_(hi|lo)$", "", key.rsplit(".", 1)[1]) for key in tensors} == {"fggm_values", "fggm_indices"}
    values = sum(t.numel() for key, t in tensors.items() if key.endswith("fggm_values"))
    assert values == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_loaded_config_has_the_policy_and_the_result_of_the_selection(tmp_path):
    model = trained(threshold=ScoreMass(0.5))
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, FGGMConfig) and config.threshold == ScoreMass(0.5)
    assert config.selection["samples"] == 8
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FGGM"


def test_a_loaded_adapter_continues_training_without_a_selection(tmp_path):
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    losses = train(model, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]


def test_an_adapter_saved_before_the_selection_still_requires_it(tmp_path):
    get_peft_model(llama(), FGGMConfig()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    model.train()
    with pytest.raises(AdapterNotSelectedError):
        model(**BATCHES[0])


def test_a_model_can_contain_the_adapters_of_several_tasks(tmp_path):
    for number, granularity in enumerate(("row", "element")):
        trained(granularity, density=0.2 + 0.1 * number).save_pretrained(tmp_path / granularity)
    model = PeftModel.from_pretrained(llama(), tmp_path / "row", adapter_name="row")
    model.load_adapter(tmp_path / "element", adapter_name="element")
    for name in ("row", "element"):
        model.set_adapter(name)
        expected = logits(PeftModel.from_pretrained(llama(), tmp_path / name), BATCHES[0])
        torch.testing.assert_close(logits(model, BATCHES[0]), expected)
    model.delete_adapter("row")
    assert not fggm_layers(model, "row")


def test_modules_to_save_are_saved_and_loaded_with_the_delta(tmp_path):
    model = trained(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(model, BATCHES[0]), logits(loaded, BATCHES[0]))


def test_loading_equal_sizes_keeps_the_parameter_objects_of_the_optimizer():
    model = trained()
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    train(model, BATCHES, steps=1)
    set_peft_model_state_dict(model, state)
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    assert torch.equal(get_peft_model_state_dict(model)[next(iter(state))], state[next(iter(state))])


def as_an_older_version_wrote_it(path, model) -> None:
    """The file with every support as plain int32."""
    tensors = {key: t for key, t in load_file(path).items() if "fggm_indices" not in key}
    for name, layer in fggm_layers(model, "default").items():
        tensors[f"base_model.model.{name}.fggm_indices"] = layer.fggm_indices["default"]
    save_file(tensors, path)


def spoil(tensors: dict, part: str, change) -> dict:
    key = next(key for key in reversed(list(tensors)) if key.endswith(f"fggm_{part}"))
    return {**tensors, key: change(tensors[key])}


SPOILED = {
    "index out of range": ("indices", lambda t: t + 10_000),
    "negative index": ("indices", lambda t: t - 10_000),
    "unsorted indices": ("indices", lambda t: t.flip(0)),
    "repeated indices": ("indices", lambda t: torch.full_like(t, 3)),
    "floating-point indices": ("indices", lambda t: t.float()),
    "a matrix of indices": ("indices", lambda t: t[None]),
    "more indices than values": ("indices", lambda t: torch.arange(len(t) + 1, dtype=torch.int32)),
    "values of another width": ("values", lambda t: torch.cat([t, t], -1)),
    "integer values": ("values", lambda t: t.int()),
    "flat values": ("values", lambda t: t.reshape(-1, 1)),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_damaged_file_raises_an_error_that_names_the_tensor_and_does_not_change_the_model(
    name, granularity, tmp_path
):
    model = trained(granularity)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    as_an_older_version_wrote_it(path, model)
    save_file(spoil(load_file(path), *SPOILED[name]), path)
    victim = copy.deepcopy(model)
    before = {key: value.clone() for key, value in victim.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"fggm_(indices|values): "):
        set_peft_model_state_dict(victim, load_file(path))
    assert all(torch.equal(value, before[key]) for key, value in victim.state_dict().items())
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_the_error_names_a_missing_tensor(tmp_path):
    model = trained()
    state = get_peft_model_state_dict(model)
    state.pop(next(key for key in state if key.endswith("fggm_indices")))
    with pytest.raises(AdapterFileError, match=r"fggm_indices: this tensor is missing"):
        set_peft_model_state_dict(model, state)


def test_an_adapter_for_another_base_is_rejected(tmp_path):
    trained().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"another base: .*down_proj is \[32, 96\] here"):
        PeftModel.from_pretrained(llama(hidden_size=32), tmp_path)


def test_the_model_card_contains_loading_code_and_keeps_the_text_of_its_author(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    assert code.startswith("import fggm_peft") and "fggm" in card.data.tags and card.data.library_name == "peft"
    assert (
        "LlamaForCausalLM.from_pretrained" in code and "8 samples" in card.text and "## Training Details" in card.text
    )
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nWritten by hand.\n")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("import fggm_peft") == 1 and "Written by hand." in text


@pytest.mark.parametrize("by_transformers", [False, True])
def test_loading_does_not_repeat_a_data_free_selection(granularity, by_transformers, tmp_path, monkeypatch):
    source = get_peft_model(llama(), FGGMConfig(granularity=granularity, criterion="random", init_weights=False))
    source.save_pretrained(tmp_path)
    monkeypatch.setattr("fggm_peft.tuner.model.choose_supports", None)
    loaded = llama()
    if by_transformers:
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(loaded, tmp_path)
    assert torch.equal(logits(loaded, BATCHES[0]), logits(source, BATCHES[0]))
