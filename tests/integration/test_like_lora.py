"""What works with PEFT's LoRA works with FGGM: each test runs both methods."""

from __future__ import annotations

import copy

import pytest
import torch
from models import bert, llama, logits, token_batches
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from reference import KINDS
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification, BertModel

from fggm_peft import FGGMConfig

BATCHES = token_batches()
pytestmark = pytest.mark.parametrize("method", ["lora", *KINDS])


def config_of(method: str, **options):
    """A config of LoRA, or of FGGM with a granularity; the values are not zero."""
    options = {"target_modules": "all-linear", **options}
    if method == "lora":
        return LoraConfig(**{"init_lora_weights": False, **options})
    return FGGMConfig(
        **{"criterion": "random", "density": 0.3, "init_weights": False, "granularity": method, **options}
    )


def values_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of an adapter, without modules that it trains whole."""
    parameters = dict(model.named_parameters()).items()
    return {name: p for name, p in parameters if f".{adapter}" in name and "modules_to_save" not in name}


class Tokens(nn.Module):
    """Token ids ``[b, t]`` -> logits ``[b, 3]``; the head has the given name."""

    def __init__(self, head: str = "head", **embedding):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6, **embedding)
        self.lin = nn.Linear(6, 6)
        self.add_module(head, nn.Linear(6, 3))
        self.head_name = head

    def forward(self, tokens):
        return getattr(self, self.head_name)(self.lin(self.embed(tokens)).mean(1))


TOKENS = torch.tensor([[0, 1, 2, 8], [3, 8, 1, 0]])


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["task", "my-task", "task_2", "Übung", "two words", "fggm"])
def test_an_adapter_of_any_name_is_saved_loaded_and_deleted(method, name, tmp_path):
    model = get_peft_model(llama(), config_of(method), adapter_name=name)
    expected = logits(model, BATCHES[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(loaded, BATCHES[0]), expected)
    loaded.load_adapter(tmp_path / name, "other")
    loaded.delete_adapter(name)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, BATCHES[0]), expected)


@pytest.mark.parametrize("head", ["head", "{}_head", "{}_scale", "my_{}_indices", "{}_"])
def test_modules_to_save_may_have_the_prefix_of_the_method_in_their_name(method, head, tmp_path):
    head = head.format("lora" if method == "lora" else "fggm")
    config = {"target_modules": ["lin"], "modules_to_save": [head]}
    model = get_peft_model(Tokens(head), config_of(method, **config))
    nn.init.normal_(getattr(model.base_model.model, head).modules_to_save["default"].weight)
    expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Tokens(head), tmp_path)(TOKENS), expected)
    other = get_peft_model(Tokens(head), config_of(method, **config))
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(other(TOKENS), expected)


@pytest.mark.parametrize("name", ["{}_proj", "{}_values", "my_{}_indices"])
def test_targeted_modules_may_have_the_prefix_of_the_method_in_their_name(method, name, tmp_path):
    name = name.format("lora" if method == "lora" else "fggm")
    model = get_peft_model(Tokens(name), config_of(method, target_modules=[name]))
    expected = model(TOKENS)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Tokens(name), tmp_path)(TOKENS), expected)


# Dtypes and hotswapping ----------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_values_follows_autocast_adapter_dtype(method, dtype, autocast, tmp_path):
    get_peft_model(llama(), config_of(method)).save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": autocast}
    half = dtype in (torch.float16, torch.bfloat16)
    expected = {torch.float32 if autocast and half else dtype}
    created = get_peft_model(llama(dtype), config_of(method), **options)
    created.add_adapter("second", config_of(method), **options)
    loaded = PeftModel.from_pretrained(llama(dtype), tmp_path, **options)
    loaded.load_adapter(tmp_path, "second", **options)
    for model in (created, loaded):
        for adapter in ("default", "second"):
            assert {parameter.dtype for parameter in values_of(model, adapter).values()} == expected


def test_pefts_hotswap_replaces_the_active_adapter(method, tmp_path):
    prefix = "lora_" if method == "lora" else "fggm_"
    for task in range(3):
        torch.manual_seed(task)
        options = {} if method == "lora" else {"seed": task}
        get_peft_model(llama(), config_of(method, **options)).save_pretrained(tmp_path / str(task))
    model = PeftModel.from_pretrained(llama(), tmp_path / "0")
    for task in (1, 2, 0):
        hotswap_adapter(model, tmp_path / str(task), "default", torch_device="cpu")
        expected = PeftModel.from_pretrained(llama(), tmp_path / str(task))
        assert torch.equal(logits(model, BATCHES[0]), logits(expected, BATCHES[0]))
    assert all(prefix in name for name in values_of(model))


# Layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 8, -9, None])
def test_the_padding_row_of_an_embedding_gets_no_gradient(method, padding):
    model = get_peft_model(Tokens(padding_idx=padding), config_of(method, target_modules=["embed"]))
    model(TOKENS).square().sum().backward()
    layer = model.base_model.model.embed
    if method == "lora":
        gradient = layer.lora_embedding_A["default"].grad.T
        assert layer.base_layer.padding_idx is None or not gradient[layer.base_layer.padding_idx].any()
        return
    gradient = torch.zeros(layer.weight_shape)
    layer.granularity["default"].put_(gradient, layer.fggm_indices["default"], layer.fggm_values["default"].grad)
    dense = Tokens(padding_idx=padding)
    with torch.no_grad():
        dense.embed.weight += layer.get_delta_weight("default")
    dense(TOKENS).square().sum().backward()
    support = torch.zeros(layer.weight_shape)
    layer.granularity["default"].put_(
        support, layer.fggm_indices["default"], torch.ones_like(layer.fggm_values["default"])
    )
    torch.testing.assert_close(gradient, dense.embed.weight.grad * support)


@pytest.mark.parametrize("length", [2, 8, 60])
def test_a_traced_model_computes_the_same(method, length):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    model = Logits(get_peft_model(llama(), config_of(method))).eval()
    ids = torch.randint(1, 50, (1, length))
    traced = torch.jit.trace(model, ids)
    torch.testing.assert_close(traced(ids.flip(1)), model(ids.flip(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 5), torch.randn(40, 6)),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)),
        (nn.Embedding(9, 6), TOKENS),
    ],
    ids=["linear", "conv1d", "conv2d", "embedding"],
)
def test_a_traced_layer_computes_the_same_and_has_the_same_gradients(method, layer, x):
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config_of(method, target_modules=["0"]))
    traced = torch.jit.trace(model, (x,))
    gradients = []
    for module in (traced, model):
        y = module(x.flip(0))
        gradients.append(torch.autograd.grad(y.square().sum(), list(values_of(model).values())))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_dtype_casting_can_be_disabled_and_enabled_again(method, dtype):
    model = get_peft_model(llama(dtype), config_of(method), autocast_adapter_dtype=False)
    expected = logits(model, BATCHES[0])
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model, BATCHES[0]), expected)
    with disable_input_dtype_casting(model, active=False):
        assert torch.equal(logits(model, BATCHES[0]), expected)
    assert torch.equal(logits(model, BATCHES[0]), expected)


# Task types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_type", "head", "trained"),
    [
        ("SEQ_CLS", BertForSequenceClassification, "classifier"),
        ("TOKEN_CLS", BertForTokenClassification, "classifier"),
        ("QUESTION_ANS", BertForQuestionAnswering, "qa_outputs"),
        ("FEATURE_EXTRACTION", BertModel, None),
    ],
)
@pytest.mark.parametrize("targets", [None, ["query", "value"], r".*\.(query|dense)"])
def test_the_head_of_a_task_type_trains_whole_and_is_saved(method, task_type, head, trained, targets, tmp_path):
    model = get_peft_model(bert(head), config_of(method, task_type=task_type, target_modules=targets))
    model.add_adapter("second", config_of(method, task_type=task_type, target_modules=targets))
    whole = {name.split(".")[-4] for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert whole == ({trained} if trained else set())
    assert not any(part in name for name in values_of(model) for part in ("classifier", "qa_outputs"))
    inputs = {"input_ids": BATCHES[0]["input_ids"]}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.requires_grad * 0.1)
        expected = model.eval()(**inputs)[0]
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(bert(head), tmp_path)
        torch.testing.assert_close(loaded(**inputs)[0], expected)
