"""Batches with a different adapter for each sample give the outputs of single samples."""

from __future__ import annotations

import copy

import pytest
import torch
from models import bert, fggm_layers, llama, t5, token_batches
from peft import get_peft_model
from reference import KINDS, TOLERANCE, relative_error
from torch import nn
from transformers import BertForSequenceClassification

from fggm_peft import FGGMConfig

NAMES = [KINDS[0], "__base__", KINDS[-1], KINDS[0], KINDS[1]]


def with_an_adapter_of_each_granularity(model: nn.Module, **config) -> nn.Module:
    """A model with one adapter for each granularity and of its name, with random supports and values."""
    for seed, kind in enumerate(KINDS):
        options = FGGMConfig(criterion="random", granularity=kind, seed=seed, density=0.3, **config)
        if seed:
            model.add_adapter(kind, options)
        else:
            model = get_peft_model(model, options, adapter_name=kind)
    for name, parameter in model.named_parameters():
        if "fggm_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def alone(model: nn.Module, name: str, inputs: dict, call=lambda model, **kwargs: model(**kwargs).logits):
    """The output for a batch in which every sample uses the same adapter."""
    if name == "__base__":
        with model.disable_adapter():
            return call(model, **inputs)
    model.set_adapter(name)
    return call(model, **inputs)


def batch_of(size: int) -> dict:
    return {key: value for key, value in token_batches((size,))[0].items() if key != "labels"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layer_uses_the_adapter_of_each_sample(example, dtype, adapt):
    x = torch.cat([example.x(dtype) for _ in range(5)])[:5]
    model = nn.Sequential()
    model.layer = copy.deepcopy(example.layer(dtype))
    model = with_an_adapter_of_each_granularity(model, target_modules=["layer"])
    if not model.base_model.model.layer.reads_inputs:
        with pytest.raises(ValueError, match="do not support adapters of parameters"):
            model(x, adapter_names=NAMES)
        return
    mixed = model(x, adapter_names=NAMES)
    assert mixed.dtype == model.base_model.model.layer.base_layer(x).dtype
    for number, name in enumerate(NAMES):
        expected = alone(model, name, {"input": x[number : number + 1]}, lambda m, input: m(input))
        assert relative_error(mixed[number : number + 1], expected) < TOLERANCE[dtype]
    with model.disable_adapter():
        assert torch.equal(model(x)[1], mixed[1])


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (lambda: llama(), {}),
        (lambda: llama(), {"target_modules": ["q_proj", "embed_tokens"]}),
        (lambda: bert(BertForSequenceClassification), {"modules_to_save": ["classifier"]}),
    ],
    ids=["every linear layer", "an embedding", "a head in modules_to_save"],
)
def test_a_mixed_batch_gives_the_outputs_of_single_samples(build, config):
    model = with_an_adapter_of_each_granularity(build(), **config)
    inputs = batch_of(len(NAMES))
    mixed = model(**inputs, adapter_names=NAMES).logits
    for number, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[number], alone(model, name, inputs)[number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", [llama, t5])
def test_generation_uses_the_adapter_of_each_sample(build, beams):
    model = with_an_adapter_of_each_granularity(build())
    inputs = batch_of(len(NAMES))
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}

    def generate(model, **kwargs):
        return model.generate(**kwargs, **settings)

    mixed = generate(model, **inputs, adapter_names=NAMES)
    for number, name in enumerate(NAMES):
        assert torch.equal(mixed[number], alone(model, name, inputs, generate)[number])
    with model.disable_adapter():
        assert not torch.equal(mixed, generate(model, **inputs)[:, : mixed.shape[1]])


def test_invalid_adapter_names_raise_the_errors_of_lora_and_leave_no_hooks():
    model = with_an_adapter_of_each_granularity(llama())
    inputs = batch_of(2)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): colour, size"):
        model(**inputs, adapter_names=["size", "colour"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 2"):
        model(**inputs, adapter_names=["row"])
    with pytest.raises(TypeError, match="expected a list of str"):
        model(**inputs, adapter_names="row")
    model.set_adapter("row")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**inputs, adapter_names=["row", "row"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=["row", "row"])
    assert not any(layer._forward_pre_hooks for layer in fggm_layers(model, "row").values())


def test_adapter_names_are_ignored_while_adapters_are_disabled():
    model = with_an_adapter_of_each_granularity(llama())
    inputs = batch_of(2)
    with model.disable_adapter():
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, adapter_names=["row", "column"]).logits, expected)


def test_an_adapter_gets_gradients_only_from_its_own_samples():
    model = with_an_adapter_of_each_granularity(llama())
    model.set_adapter("row")
    loss = model(**batch_of(2), adapter_names=["row", "__base__"]).logits[1].sum()
    values = [layer.fggm_values["row"] for layer in fggm_layers(model, "row").values()]
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, values))
