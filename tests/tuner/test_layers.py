"""Adapted layers of every type, against the base layer's own forward in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import QUANTIZATIONS, quantized_layer
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from reference import KINDS, TOLERANCE, dense_delta, layer_output, relative_error, stored
from torch import nn
from transformers.pytorch_utils import Conv1D

from fggm_peft import FGGMConfig, FGGMLayer
from fggm_peft.core.errors import AdapterNotSelectedError
from fggm_peft.core.granularity import Rows
from fggm_peft.tuner.layer_types import LAYER_TYPES, make_layer

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adapted(model) -> FGGMLayer:
    return model.base_model.model.layer


def delta_of(layer, adapter="default"):
    """The dense delta of one adapter, ``[o, i]`` float64, differentiable in its values."""
    d = layer.delta(adapter)
    return d.scale * dense_delta(d.granularity.name, layer.weight_shape, d.indices, d.values)


def leaf(x):
    return x.detach().requires_grad_() if x.is_floating_point() else x


def assert_like_dense(model, base, x, dtype, adapters=("default",), after=lambda y: y):
    """Check output and gradients of input and values; ``base`` is the layer without the adapter."""
    layer = adapted(model)
    leaves = [layer.fggm_values[name] for name in adapters]
    x, x_dense = leaf(x), leaf(x)
    y = model(x)
    delta = sum(delta_of(layer, name) for name in adapters)
    expected = after(layer_output(base, x_dense, delta))
    assert relative_error(y, expected) < TOLERANCE[dtype]
    g = torch.randn(y.shape).to(y.dtype)
    wanted_leaves = [*leaves, x_dense] if x.is_floating_point() else leaves
    leaves = [*leaves, x] if x.is_floating_point() else leaves
    wanted = torch.autograd.grad(expected, wanted_leaves, g.double())
    for gradient, dense in zip(torch.autograd.grad(y, leaves, g), wanted, strict=True):
        assert relative_error(gradient, dense) < TOLERANCE[dtype]
    return y


def test_every_layer_type_has_an_example(layer_examples):
    layers = [example.build() for example in layer_examples.values()]
    for description in LAYER_TYPES:
        matches, layer_class = LAYER_TYPES[description].matches, LAYER_TYPES[description].layer_class
        result = [layer for layer in layers if matches(layer)]
        assert result, f"add an example of {description} to conftest.py"
        assert all(isinstance(make_layer(layer, "layer"), layer_class) for layer in result)


# One adapter -------------------------------------------------------------------------------------


@each_dtype
def test_forward_and_gradients_agree_with_dense(example, granularity, dtype, adapt):
    base, x = example.layer(dtype), example.x(dtype)
    model = adapt(copy.deepcopy(base), granularity=granularity)
    values = adapted(model).fggm_values["default"]
    assert values.dtype == torch.float32
    assert values.numel()
    assert assert_like_dense(model, base, x, dtype).dtype == dtype
    assert not any(p.requires_grad for p in adapted(model).base_layer.parameters())


def test_a_new_adapter_does_not_change_the_output(example, granularity, adapt):
    base, x = example.layer(), example.x()
    model = adapt(copy.deepcopy(base), granularity=granularity, zero=True)
    assert adapted(model).fggm_values["default"].count_nonzero() == 0
    expected = base.to(memory_format=torch.contiguous_format)(x)
    assert relative_error(model(x), expected) < 1e-7


def test_a_disabled_adapter_gives_the_output_of_the_base_layer_bit_exactly(example, granularity, adapt):
    base, x = example.layer(), example.x()
    model = adapt(copy.deepcopy(base), granularity=granularity)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@each_dtype
def test_merging_rounds_once_and_unmerging_is_bit_exact(example, granularity, dtype, adapt):
    base, x = example.layer(dtype), example.x(dtype)
    model = adapt(copy.deepcopy(base), granularity=granularity)
    layer, before = adapted(model), model(x)
    weight = layer.get_base_layer().weight
    with torch.no_grad():
        once = (base.weight.float() + stored(base, delta_of(layer)).float()).to(dtype)
    model.merge_adapter()
    assert torch.equal(weight, once)
    assert weight.stride() == base.weight.stride()
    assert relative_error(model(x), before) < TOLERANCE[dtype] / 10
    model.unmerge_adapter()
    assert torch.equal(weight, base.weight)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv2d"])
def test_the_output_in_training_equals_the_merged_output_exactly(name, layer_examples, adapt):
    base, x = layer_examples[name].layer(torch.bfloat16), layer_examples[name].x(torch.bfloat16)
    model = adapt(base, density=1.0)
    before = model(x)
    model.merge_adapter()
    assert torch.equal(model(x), before)


def test_merge_and_unload_returns_the_plain_layer(example, granularity, adapt):
    base, x = example.layer(), example.x()
    model = adapt(copy.deepcopy(base), granularity=granularity)
    expected = layer_output(base, x, delta_of(adapted(model)))
    plain = model.merge_and_unload()
    assert type(plain.layer) is type(base)
    assert relative_error(plain(x), expected) < TOLERANCE[torch.float32]


def test_get_delta_weight_has_the_layout_of_the_base_weight(example, granularity, adapt):
    base = example.layer()
    layer = adapted(adapt(base, granularity=granularity))
    layer.set_scale("default", 0.5)
    delta = layer.get_delta_weight("default")
    assert delta.shape == base.weight.shape
    torch.testing.assert_close(delta.double(), stored(base, delta_of(layer)))
    assert not delta.requires_grad


def test_without_gradients_only_many_positions_copy_the_weight(granularity, adapt, monkeypatch):
    base, copies = nn.Linear(7, 5), []
    model = adapt(copy.deepcopy(base), granularity=granularity)
    layer, original = adapted(model), adapted(model).weight_copy
    monkeypatch.setattr(layer, "weight_copy", lambda: copies.append(1) or original())
    for x, expected in ((torch.randn(2, 15, 7), 0), (torch.randn(2, 64, 7), 1)):
        with torch.no_grad():
            y = model(x)
        assert len(copies) == expected
        assert relative_error(y, layer_output(base, x, delta_of(layer))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_with_float32_values(example, granularity, dtype, adapt):
    base, x = example.layer(dtype), example.x(torch.float32)
    model = adapt(copy.deepcopy(base), granularity=granularity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = base(x)
        y = assert_like_dense(model, base, x, torch.bfloat16)
    assert y.dtype == plain.dtype
    assert adapted(model).fggm_values["default"].dtype == torch.float32


def test_autocast_does_not_change_float64(granularity, adapt):
    base, x = nn.Linear(7, 5, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    model = adapt(copy.deepcopy(base), granularity=granularity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = assert_like_dense(model, base, x, torch.float64)
    assert y is None or y.dtype == torch.float64


def test_a_layer_on_the_meta_device_returns_the_correct_shape(granularity, adapt):
    model = adapt(nn.Linear(7, 5), granularity=granularity).to("meta")
    x = torch.empty(4, 7, device="meta", requires_grad=True)
    for positions in (x, x.expand(40, 4, 7)):
        assert model(positions).shape == (*positions.shape[:-1], 5)


# Base layers with their own forward -----------------------------------------------------------------


def test_hooks_of_the_base_layer_run_and_can_change_the_output(example, granularity, adapt):
    base, x, calls = example.layer(), example.x(), []
    model = adapt(copy.deepcopy(base), granularity=granularity)
    adapted(model).base_layer.register_forward_hook(lambda module, args, output: calls.append(1) or output)
    assert_like_dense(model, base, x, torch.float32)
    assert calls == [1]
    adapted(model).base_layer.register_forward_hook(lambda module, args, output: output + 3)
    assert_like_dense(model, base, x, torch.float32, after=lambda y: y + 3)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv2d", "embedding"])
def test_a_layer_wrapped_by_another_tuner_keeps_its_adapter(name, granularity, layer_examples, adapt):
    base, x = layer_examples[name].layer(), layer_examples[name].x()
    host = nn.Sequential()
    host.layer = copy.deepcopy(base)
    config = LoraConfig(target_modules=["layer"], r=2, init_lora_weights=False, fan_in_fan_out=isinstance(base, Conv1D))
    inject_adapter_in_model(config, host, adapter_name="inner")
    lora = host.layer.get_delta_weight("inner").detach()
    model = adapt(host.layer, granularity=granularity)
    twin = copy.deepcopy(base)
    twin.weight.data += lora
    assert_like_dense(model, twin, x, torch.float32)


class ShiftedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 3


class ShiftedConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 3


class ScaledEmbedding(nn.Embedding):
    """An embedding like those of Gemma and BART."""

    embed_scale = 2.5

    def forward(self, tokens):
        return super().forward(tokens) * self.embed_scale


@pytest.mark.parametrize(
    ("build", "like"),
    [
        (lambda: ShiftedLinear(7, 5), "linear"),
        (lambda: ShiftedConv2d(4, 6, (3, 2)), "conv2d"),
        (lambda: ScaledEmbedding(11, 6), "embedding"),
    ],
    ids=["linear", "conv2d", "embedding"],
)
def test_the_forward_of_a_subclass_is_used(build, like, granularity, layer_examples, adapt):
    base, x = build(), layer_examples[like].x()
    assert_like_dense(adapt(copy.deepcopy(base), granularity=granularity), base, x, torch.float32)


# Several adapters, and biases ----------------------------------------------------------------------


def test_several_active_adapters_add_up_with_their_scales(example, adapt):
    base, x = example.layer(), example.x()
    names = list(KINDS)
    model = adapt(copy.deepcopy(base), granularity=names[0])
    for seed, name in enumerate(names):
        config = FGGMConfig(
            target_modules=["layer"], criterion="random", granularity=name, init_weights=False, seed=1 + seed
        )
        model.add_adapter(name, config)
    layer = adapted(model)
    for scale, name in zip((0.5, -2.0, 0.25, 3.0), names, strict=False):
        layer.set_scale(name, scale)
    layer.set_scale("no such adapter", 7.0)
    active = ["default", *names]
    model.base_model.set_adapter(active)
    assert_like_dense(model, base, x, torch.float32, active)
    before = model(x)
    model.merge_adapter()
    assert relative_error(model(x), before) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, base.weight)
    model.set_adapter(names[-1])
    assert_like_dense(model, base, x, torch.float32, names[-1:])


@pytest.mark.parametrize("name", ["linear", "Conv1D", "conv2d"])
def test_with_bias_all_the_bias_of_the_base_layer_gets_its_gradient(name, granularity, layer_examples, adapt):
    base, x = layer_examples[name].layer(), layer_examples[name].x()
    model = adapt(copy.deepcopy(base), bias="all", granularity=granularity)
    bias = adapted(model).get_base_layer().bias
    y = assert_like_dense(model, base, x, torch.float32)
    (gradient,) = torch.autograd.grad(model(x).sum(), bias)
    assert relative_error(gradient, torch.full_like(bias, y.numel() / len(bias))) < TOLERANCE[torch.float32]


# State -------------------------------------------------------------------------------------------


def test_an_adapter_without_a_support_can_be_evaluated_but_not_trained(adapt):
    base, x = nn.Linear(7, 5), torch.randn(3, 7)
    model = adapt(copy.deepcopy(base), criterion="fisher")
    with pytest.raises(AdapterNotSelectedError, match=r"'default' has no support yet.*select_parameters"):
        model.train()(x)
    assert torch.equal(model.eval()(x), base(x))
    with torch.no_grad():
        assert torch.equal(model.train()(x), base(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_an_adapted_model_is_independent(example, granularity, duplicate, adapt):
    base, x = example.layer(), example.x()
    model = adapt(copy.deepcopy(base), granularity=granularity)
    expected = model(x)
    twin = duplicate(model)
    assert torch.equal(twin(x), expected)
    adapted(twin).fggm_values["default"].data += 1
    assert_like_dense(twin, base, x, torch.float32)
    twin.merge_adapter()
    assert torch.equal(model(x), expected)


def test_torch_moves_casts_and_saves_values_and_indices(granularity, adapt):
    layer = adapted(adapt(nn.Linear(7, 5), granularity=granularity))
    assert {"fggm_values.default", "fggm_indices.default"} <= set(layer.state_dict())
    assert dict(layer.named_parameters())["fggm_values.default"].requires_grad
    indices = layer.fggm_indices["default"].clone()
    layer.to(torch.float64)
    assert layer.fggm_values["default"].dtype == torch.float64
    assert layer.fggm_indices["default"].dtype == torch.int32
    assert torch.equal(layer.fggm_indices["default"], indices)
    assert layer.to("meta").fggm_indices["default"].is_meta


@pytest.mark.parametrize(
    ("shape", "dtype"), [((32767, 65536), torch.int32), ((32768, 65536), torch.int64), ((4, 5), torch.int32)]
)
def test_indices_are_int64_only_if_a_flat_index_does_not_fit_int32(shape, dtype, granularity, adapt):
    with torch.device("meta"):
        model = adapt(nn.Linear(shape[1], shape[0]), granularity=granularity)
    layer = adapted(model)
    assert layer.fggm_indices["default"].dtype == dtype
    layer.resize_("default", 3)
    assert layer.fggm_indices["default"].dtype == dtype


# Unsupported layers ----------------------------------------------------------------------------------


class Matrix(nn.Module):
    """A module with one 3-D parameter, as used for experts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))


UNSUPPORTED = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 3, 2),
    "EmbeddingBag": lambda: nn.EmbeddingBag(3, 4),
    "NonDynamicallyQuantizableLinear": lambda: nn.MultiheadAttention(4, 2).out_proj,
    "Matrix": Matrix,
}


@pytest.mark.parametrize(("name", "build"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_an_unsupported_module_raises_an_error_that_lists_the_supported_types(name, build, adapt):
    with pytest.raises(TypeError, match=rf"layer is a .*\.{name}, which FGGM does not support") as error:
        adapt(build())
    for description in LAYER_TYPES:
        assert description in str(error.value)


def test_a_four_bit_embedding_is_not_supported(adapt):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Embedding4bit(16, 64).to("cpu")
    with pytest.raises(TypeError, match=r"Embedding4bit, which FGGM does not support"):
        adapt(layer)


def test_an_unsupported_module_does_not_change_the_model():
    """Targets that PEFT wrapped before the unsupported module are unwrapped again."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    before = str(model)
    with pytest.raises(TypeError, match="LSTM"):
        get_peft_model(model, FGGMConfig(target_modules=["0", "1"], criterion="random"))
    assert str(model) == before
    adapted = get_peft_model(model, FGGMConfig(target_modules=["0"], criterion="random"))
    before = str(adapted)
    with pytest.raises(TypeError, match="LSTM"):
        adapted.add_adapter("second", FGGMConfig(target_modules=["0", "1"], criterion="random"))
    assert str(adapted) == before and list(adapted.peft_config) == ["default"]


def test_a_weight_that_the_granularity_does_not_support_is_an_error_with_its_module_path(monkeypatch):
    monkeypatch.setattr(Rows, "supports", lambda self, shape: shape[0] % 4 == 0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = str(model)
    with pytest.raises(ValueError, match=r"^1: granularity='row' does not support a weight of shape \[5, 4\]"):
        get_peft_model(model, FGGMConfig(target_modules=["0", "1"], criterion="random"))
    assert str(model) == before


# Changes between forward and backward --------------------------------------------------------------


@torch.no_grad()
def write(model, weight):
    weight.mul_(2)


@torch.no_grad()
def write_a_part(model, weight):
    weight[0].add_(1)


def load(model, weight):
    model.load_state_dict({key: tensor + 1 for key, tensor in model.state_dict().items() if tensor is weight}, False)
    with torch.no_grad():
        weight.copy_(weight + 1)


@torch.no_grad()
def optimize(model, weight):
    weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


CHANGES = {"write": write, "write a part": write_a_part, "load": load, "optimize": optimize}
MERGES = {
    "merge": lambda model, weight: model.merge_adapter(),
    "merge and unload": lambda model, weight: model.merge_and_unload(),
    "merge safely": lambda model, weight: model.merge_adapter(safe_merge=True),
}


@pytest.mark.parametrize("change", [*CHANGES.values(), *MERGES.values()], ids=[*CHANGES, *MERGES])
@pytest.mark.parametrize("additive", [False, True])
def test_changing_a_weight_between_forward_and_backward_raises_an_error(change, additive, granularity, adapt):
    """``nn.Linear`` raises a ``RuntimeError`` too."""
    x = torch.randn(4, 9, 7, requires_grad=True)
    if change in CHANGES.values():
        plain = nn.Sequential(nn.Linear(7, 5).requires_grad_(False))
        y = plain(x)
        change(plain, plain[0].weight)
        with pytest.raises(RuntimeError, match="modified"):
            y.sum().backward()
    model = adapt(nn.Linear(7, 5), granularity=granularity)
    layer = model.base_model.model.layer
    if additive:
        layer.base_layer.register_forward_hook(lambda module, args, output: None)
    y = model(x)
    change(model, layer.base_layer.weight)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_replacing_the_data_of_a_weight_between_forward_and_backward_raises_an_error(adapt):
    model = adapt(nn.Linear(7, 5))
    y = model(torch.randn(4, 9, 7, requires_grad=True))
    weight = model.base_model.model.layer.base_layer.weight
    weight.data = weight.data * 2
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


@pytest.mark.parametrize("mode", ["keep", "requantize"])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_merging_into_a_quantized_layer_between_forward_and_backward_raises_an_error(kind, mode, adapt):
    model = adapt(quantized_layer(nn.Linear(64, 32), kind), quantized_merge=mode)
    y = model(torch.randn(4, 9, 64, requires_grad=True))
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_the_values_get_their_gradient_if_the_input_needs_none(adapt):
    model = adapt(nn.Linear(7, 5))
    y = model(torch.randn(4, 9, 7))
    write(model, model.base_model.model.layer.base_layer.weight)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
