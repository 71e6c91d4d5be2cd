"""torchao and HQQ bases on a CPU, which use PEFT's quantization backends like bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from models import fggm_layers, llama, logits, token_batches, train
from models import quantized as quantized_by_bitsandbytes
from peft import PeftModel, get_peft_model
from reference import dense_delta
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, TorchAoConfig

from fggm_peft import BaseMismatchError, FGGMConfig, Ledger, LossyMergeError, select_parameters
from fggm_peft.deltas import verify
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.tuner.hosts.bitsandbytes import guard_four_bit_layers
from fggm_peft.tuner.merging.merge import total
from fggm_peft.tuner.merging.sidecar import SIDECAR
from fggm_peft.tuner.target import find_targets

TORCHAO = ("int8", "int8 with int8 inputs", "float8", "int4", "int4 with int8 inputs")
HQQ = ("hqq 8 bits", "hqq 4 bits", "hqq 2 bits")
QUANTIZATIONS = TORCHAO + HQQ


def _torchao_config(kind: str):
    torchao = pytest.importorskip("torchao.quantization")
    configs: dict[str, Callable] = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8 with int8 inputs": torchao.Int8DynamicActivationInt8WeightConfig,
        "float8": torchao.Float8WeightOnlyConfig,
        "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "int4 with int8 inputs": lambda: torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    }
    return configs[kind]()


def _with_torchao(model: nn.Module, names: list[str], kind: str) -> None:
    quantization = _torchao_config(kind)
    from torchao import quantize_

    quantize_(model, quantization, filter_fn=lambda module, name: name in names)
    # PEFT reads this attribute of transformers' quantizer
    model.hf_quantizer = SimpleNamespace(quantization_config=_Configuration(quantization))


class _Configuration:
    def __init__(self, quantization: object):
        self.quantization = quantization

    def get_apply_tensor_subclass(self) -> object:
        return self.quantization


def _with_hqq(model: nn.Module, names: list[str], kind: str) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    for name in names:
        layer = model.get_submodule(name)
        settings = hqq.BaseQuantizeConfig(nbits=int(kind.split()[1]), group_size=16)
        parent, _, child = name.rpartition(".")
        new = hqq.HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device="cpu")
        setattr(model.get_submodule(parent), child, new)


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """Quantize every linear layer except the head, in place."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    (_with_torchao if kind in TORCHAO else _with_hqq)(model, names, kind)
    return model.eval()


BATCHES = token_batches(sizes=(5, 4, 5), padding="right")
KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)
UP = "model.layers.0.mlp.up_proj"


def adapted(kind: str, granularity: str = "row", **config):
    return get_peft_model(quantized(llama(), kind), FGGMConfig(granularity=granularity, **config))


def random_deltas(kind: str, granularity: str = "row", **config):
    return adapted(kind, granularity, criterion="random", init_weights=False, **config)


def rounding(kind: str) -> float:
    """Relative error of the output, larger for layers that also quantize their inputs."""
    return 0.03 if "inputs" in kind else 1e-5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@KINDS
def test_select_train_save_reload_merge(kind, granularity, tmp_path):
    model = adapted(kind, granularity, quantized_merge="keep")
    assert len(fggm_layers(model, "default")) == 14  # all linear layers except the head
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1], steps=6)
    assert losses[-1] < losses[0]
    end = logits(model, BATCHES[0])
    assert torch.equal(logits(copy.deepcopy(model), BATCHES[0]), end)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(quantized(llama(), kind), tmp_path)
    assert torch.equal(logits(fresh, BATCHES[0]), end)
    merged = logits(model.merge_and_unload(), BATCHES[0])
    assert relative(merged, end) < rounding(kind)


@KINDS
@pytest.mark.parametrize("positions", [3, 40])
def test_forward_and_gradients_agree_with_the_dequantized_weight(kind, granularity, positions):
    """The layer's own product is used for few positions without gradients, otherwise a copy of the weight."""
    layer = fggm_layers(random_deltas(kind, granularity), "default")[UP]
    delta = layer.delta("default")
    dense = dense_delta(granularity, layer.weight_shape, delta.indices, delta.values)
    weight = (layer.weight_copy().double() + dense).detach().requires_grad_()
    x = torch.randn(positions, layer.in_features, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    expected = x64 @ weight.T
    with torch.no_grad():
        assert relative(layer(x), expected) < rounding(kind)
    g = torch.randn(expected.shape)
    layer(x).backward(g)
    expected.backward(g.double())
    assert relative(x.grad, x64.grad) < 1e-5
    wanted = delta.granularity.gather(weight.grad, delta.indices)
    assert relative(delta.values.grad, wanted) < 1e-5


@KINDS
def test_fisher_scores_agree_with_the_dequantized_model(kind, granularity):
    model = adapted(kind, granularity)
    dense = llama()
    for name, layer in fggm_layers(model, "default").items():
        dense.get_submodule(name).weight.data.copy_(layer.weight_copy())
    dense = get_peft_model(dense, FGGMConfig(granularity=granularity))
    scores = []
    for one in (model, dense):
        scores.append(DataPass(one, one.peft_config["default"], BATCHES).run(find_targets(one, "default")))
    for name in fggm_layers(model, "default"):
        ours, theirs = (totals.mean(name, "fisher") for totals in scores)
        # the inputs of the first layers require no gradient, so these layers use their own product
        assert relative(ours, theirs) < (0.02 if "inputs" in kind else 1e-3), name


@KINDS
@pytest.mark.parametrize("mode", ["auto", "requantize", "keep"])
def test_unmerging_restores_the_quantized_base(kind, mode):
    model = random_deltas(kind, quantized_merge=mode)
    before = logits(model, BATCHES[0])
    weights = [layer.weight_copy().clone() for layer in fggm_layers(model, "default").values()]
    model.merge_adapter(safe_merge=True)
    bases = [layer.get_base_layer() for layer in fggm_layers(model, "default").values()]
    assert all(hasattr(base, SIDECAR) == (mode == "keep") for base in bases)
    merged = logits(model, BATCHES[0])
    if mode == "keep":
        assert relative(merged, before) < 5 * rounding(kind)
    assert torch.equal(logits(copy.deepcopy(model), BATCHES[0]), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), before)
    for layer, weight in zip(fggm_layers(model, "default").values(), weights, strict=True):
        assert torch.equal(layer.weight_copy(), weight)


@pytest.mark.parametrize("kind", ["int8", "hqq 8 bits"])
def test_auto_raises_an_error_instead_of_losing_the_delta(kind):
    model = random_deltas(kind)
    with torch.no_grad():
        for layer in fggm_layers(model, "default").values():
            layer.fggm_values["default"] *= 1e-5
    before = logits(model, BATCHES[0])
    with pytest.raises(LossyMergeError, match=r"\d\.\d% of the delta"):
        model.merge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), before)


@KINDS
def test_the_fingerprint_matches_the_quantized_base(kind, tmp_path):
    """Two-bit weights differ more than a fingerprint allows, so such a base matches only itself."""
    random_deltas(kind).save_pretrained(tmp_path / "quantized")
    assert verify(tmp_path / "quantized", quantized(llama(), kind))["base"] == "matches"
    dense = get_peft_model(llama(), FGGMConfig(criterion="random", init_weights=False))
    dense.save_pretrained(tmp_path / "dense")
    if "2 bits" not in kind:
        PeftModel.from_pretrained(quantized(llama(), kind), tmp_path / "dense")
        PeftModel.from_pretrained(llama(), tmp_path / "quantized")
    torch.manual_seed(1)
    other = LlamaForCausalLM(llama().config)
    for folder in ("quantized", "dense"):
        with pytest.raises(BaseMismatchError, match="another base"):
            PeftModel.from_pretrained(quantized(copy.deepcopy(other), kind), tmp_path / folder)


@pytest.mark.parametrize("kind", ["int8", "hqq 4 bits"])
def test_a_ledger_supports_quantized_bases(kind, tmp_path):
    random_deltas(kind, density=0.2).save_pretrained(tmp_path / "a")
    later = adapted(kind, density=0.2)
    select_parameters(later, BATCHES, progress=False)
    train(later, BATCHES)
    later.save_pretrained(tmp_path / "b")
    ledger = Ledger(tmp_path / "ledger")
    for task in "ab":
        ledger.add(task, tmp_path / task)
    model, without = quantized(llama(), kind), quantized(llama(), kind)
    ledger.apply(model)
    ledger.rollback("a", model)
    alone = PeftModel.from_pretrained(without, tmp_path / "b")
    assert relative(logits(model, BATCHES[0]), logits(alone, BATCHES[0])) < 1e-4


@pytest.mark.parametrize("kind", ["int4", "hqq 4 bits"])
def test_the_next_task_starts_from_the_sidecar(kind):
    model = random_deltas(kind, quantized_merge="keep")
    before = logits(model, BATCHES[0])
    model = get_peft_model(model.merge_and_unload(), FGGMConfig(granularity="element"))
    assert relative(logits(model, BATCHES[0]), before) < 1e-5
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1])
    assert losses[-1] < losses[0]


def test_transformers_loads_a_quantized_base(tmp_path):
    """Only torchao: since transformers 5, its HQQ loader raises NotImplementedError."""
    torchao = pytest.importorskip("torchao.quantization")
    llama().save_pretrained(tmp_path / "base")
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    options = {"quantization_config": settings, "device_map": "cpu", "dtype": torch.float32}
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", **options)
    model = get_peft_model(base, FGGMConfig(quantized_merge="requantize"))
    assert all(layer.quantization_backend is not None for layer in fggm_layers(model, "default").values())
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1])
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "delta")
    fresh = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tmp_path / "base", **options), tmp_path / "delta"
    )
    assert torch.equal(logits(fresh, BATCHES[0]), logits(model, BATCHES[0]))
    layers = fggm_layers(model, "default").values()
    assert total([layer.quantized_replacement(["default"], safe=False)[1] for layer in layers]).survived > 0.9


def test_a_torchao_layer_without_its_quantization_config_raises_an_error():
    """PEFT reads the config from transformers' quantizer, which is missing if torchao was called directly."""
    base = quantized(llama(), "int8")
    del base.hf_quantizer
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        get_peft_model(base, FGGMConfig())


def test_all_linear_targets_the_same_layers_for_every_quantization():
    dense = set(fggm_layers(get_peft_model(llama(), FGGMConfig()), "default"))
    for kind in ("int8", "hqq 4 bits"):
        model = adapted(kind, target_modules="all-linear")
        assert set(fggm_layers(model, "default")) == dense
        model.add_adapter("second", FGGMConfig(target_modules="all-linear"))
        assert set(fggm_layers(model, "second")) == dense
    base = quantized_by_bitsandbytes(llama(), "nf4")
    assert set(fggm_layers(get_peft_model(base, FGGMConfig()), "default")) == dense


def test_all_linear_targets_quantized_and_dense_layers_of_a_partly_quantized_base():
    base = quantized(nn.Sequential(nn.Linear(32, 32)), "hqq 4 bits")
    base.append(nn.Linear(32, 32))
    assert set(fggm_layers(get_peft_model(base, FGGMConfig()), "default")) == {"0", "1"}


# Marks of quantization ---------------------------------------------------------------------------


def four_bit():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def eight_bit():
    return BitsAndBytesConfig(load_in_8bit=True)


def torchao_config():
    return TorchAoConfig(_torchao_config("int8"))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("mode", ["requantize", "keep"])
@pytest.mark.parametrize("quantization", [four_bit, eight_bit, torchao_config])
def test_a_merged_base_keeps_the_layers_that_its_config_describes(quantization, mode, settings, tmp_path):
    """Otherwise it could not be loaded again. Merging never makes a quantized layer dense."""

    def kinds(model):
        weights = {path: type(m.weight) for path, m in model.named_modules() if hasattr(m, "weight")}
        return weights, {path: type(m) for path, m in model.named_modules() if hasattr(m, "weight")}

    llama(intermediate_size=128).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization(), dtype=torch.float32
    )
    before = kinds(base)
    model = get_peft_model(base, FGGMConfig(quantized_merge=mode, **settings))
    select_parameters(model, token_batches(), progress=False)
    train(model, token_batches(), steps=2, lr=0.05)
    merged = model.merge_and_unload()
    assert kinds(merged) == before
    if mode == "requantize":
        expected = logits(merged, token_batches()[0])
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        guard_four_bit_layers(again)  # without it, bitsandbytes rounds scales on a CPU
        assert torch.equal(logits(again, token_batches()[0]), expected)
