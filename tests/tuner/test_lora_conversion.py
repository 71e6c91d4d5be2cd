"""PEFT's conversion of an adapter to LoRA, which is exact if the rank suffices."""

from __future__ import annotations

import copy

import pytest
import torch
from models import gpt2, llama, logits, quantized, token_batches
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from reference import KINDS
from torch import nn

from fggm_peft import FGGMConfig

BATCH = token_batches()[0]


def adapted(base: nn.Module, granularity: str, **config) -> PeftModel:
    options = {"criterion": "random", "density": 0.1, "init_weights": False} | config
    return get_peft_model(base, FGGMConfig(granularity=granularity, **options))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "element"])
def test_rows_and_columns_convert_to_a_lora_of_their_number(kind, build, tmp_path):
    model = adapted(build(), kind, max_units=4)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    save_as_lora(tmp_path, model, rank=4)
    lora = PeftModel.from_pretrained(build(), tmp_path)
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(lora, BATCH), logits(model, BATCH), rtol=1e-4, atol=1e-4)


def test_a_lower_rank_gives_the_best_approximation_of_that_rank(granularity):
    model = adapted(llama(), granularity)
    config, state = convert_to_lora(model, rank=0.8)
    for name, module in model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default")
        kept = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        singular = torch.linalg.svdvals(delta.double())
        rank = len(state[f"{name}.lora_A.weight"])
        assert config.rank_pattern.get(name.removeprefix("base_model.model."), 1) == rank
        assert float((delta - kept).norm()) == pytest.approx(float(singular[rank:].norm()), rel=1e-3, abs=1e-4)
        assert float(singular[:rank].square().sum() / singular.square().sum()) > 0.8 - 1e-6


def test_a_delta_on_a_quantized_base_converts_without_the_base(granularity):
    model = adapted(quantized(llama(), "nf4"), granularity, target_modules=["up_proj"])
    _, state = convert_to_lora(model, rank=64)
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        delta = model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"], delta)


def test_peft_rejects_convolutions_and_biases():
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Conv1d(2, 4, 3)), "row", target_modules=["0"])
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    model = adapted(nn.Sequential(nn.Linear(3, 4)), "row", target_modules=["0"], bias="all")
    with pytest.raises(ValueError, match="bias=all"):
        convert_to_lora(model, rank=2)


def test_conversion_does_not_change_the_model(granularity):
    model = adapted(llama(), granularity)
    before = copy.deepcopy(model.state_dict())
    assert model.supports_lora_conversion()
    convert_to_lora(model, rank=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
