"""bitsandbytes bases on a CPU: the whole workflow, known pitfalls, and the four ways to merge."""

from __future__ import annotations

import copy

import pytest
import torch
from models import QUANTIZATIONS, fggm_layers, llama, logits, quantized, quantized_layer, token_batches, train
from peft import PeftModel, get_peft_model
from torch import nn

from fggm_peft import FGGMConfig, FGGMLayer, LossyMergeError, select_parameters
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.tuner.merging.sidecar import SIDECAR
from fggm_peft.tuner.target import find_targets

pytest.importorskip("bitsandbytes")
BATCHES = token_batches(sizes=(5, 4, 5), padding="right")  # enough positions to use the effective weight
KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)


def adapted(kind: str, granularity: str = "row", **config):
    return get_peft_model(quantized(llama(), kind).eval(), FGGMConfig(granularity=granularity, **config))


def trained(kind: str, granularity: str = "row", lr: float = 1e-2, **config):
    model = adapted(kind, granularity, **config)
    select_parameters(model, BATCHES, progress=False)
    train(model, BATCHES, steps=3, lr=lr)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """A dense model with the dequantized weights of the quantized model."""
    dense = llama()
    for name, layer in fggm_layers(model, "default").items():
        dense.get_submodule(name).weight.data.copy_(layer.weight_copy())
    return dense


@KINDS
def test_select_train_evaluate_train_save_reload_merge(kind, granularity, tmp_path):
    model = adapted(kind, granularity, quantized_merge="keep")
    start = logits(model, BATCHES[0])
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1], steps=4)
    middle = logits(model, BATCHES[0])
    losses += train(model, BATCHES[:1], steps=4)  # after an evaluation, because bitsandbytes repacks its weights then
    assert losses[-1] < losses[3] < losses[0] and losses[4] < losses[0]
    end = logits(model, BATCHES[0])
    assert not torch.equal(start, middle) and not torch.equal(middle, end)
    torch.testing.assert_close(logits(copy.deepcopy(model), BATCHES[0]), end)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(quantized(llama(), kind).eval(), tmp_path)
    torch.testing.assert_close(logits(fresh, BATCHES[0]), end)
    tolerance = 2e-2 if kind == "int8" else 1e-4  # int8 layers quantize activations in eval mode
    torch.testing.assert_close(logits(model.merge_and_unload(), BATCHES[0]), end, rtol=tolerance, atol=tolerance)


@KINDS
def test_forward_and_gradients_agree_with_the_dequantized_model(kind, granularity):
    model = adapted(kind, granularity, criterion="random", init_weights=False)
    dense = get_peft_model(
        dequantized(model), FGGMConfig(granularity=granularity, criterion="random", init_weights=False)
    )
    for one in (model, dense):
        one.train()
        one(**BATCHES[0]).loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if "fggm_values" in name:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


@KINDS
@pytest.mark.parametrize("forward_first", [False, True])
def test_fisher_scores_agree_with_the_dequantized_model(kind, granularity, forward_first):
    """The order matters, because bitsandbytes' 8-bit layers change their scales in the first forward pass."""
    model = adapted(kind, granularity)
    dense = get_peft_model(dequantized(model), FGGMConfig(granularity=granularity))
    model.train()
    if forward_first:
        with torch.no_grad():
            model(**BATCHES[0])
    scores = []
    for one in (model, dense):
        scores.append(DataPass(one, one.peft_config["default"], BATCHES).run(find_targets(one, "default")))
    # int8 layers quantize activations in eval mode, so their outputs differ slightly
    rounding = 0.05 if kind == "int8" else 1e-3
    for name in fggm_layers(model, "default"):
        ours, theirs = (totals.mean(name, "fisher") for totals in scores)
        error = (ours - theirs).norm() / theirs.norm()
        assert error < rounding, (name, float(error))


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_a_model_evaluated_before_adding_the_adapter_still_trains(kind):
    """The evaluation repacks bitsandbytes' weights if the processor supports its kernel."""
    base = quantized(llama(intermediate_size=128), kind)  # repacking fails for widths such as 96
    expected = logits(base, BATCHES[0])
    repacked = getattr(base.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False)
    if repacked:
        with pytest.warns(UserWarning, match="repacked"):
            model = get_peft_model(base, FGGMConfig())
    else:
        model = get_peft_model(base, FGGMConfig())
    torch.testing.assert_close(logits(model, BATCHES[0]), expected, rtol=0.05, atol=0.02)
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1], steps=5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(33, 65), (100, 512), (200, 300)])
def test_odd_shapes_evaluate_and_train(shape):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    base[0] = quantized_layer(base[0], "nf4")
    model = get_peft_model(base.eval(), FGGMConfig(target_modules=["0"], criterion="random", init_weights=False))
    x = torch.randn(4, shape[1])
    with torch.no_grad():
        expected = model(x)
    model.train()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@KINDS
@pytest.mark.parametrize("mode", ["auto", "requantize", "keep"])
def test_unmerging_restores_the_quantized_base(kind, mode):
    model = trained(kind, quantized_merge=mode)
    before = logits(model, BATCHES[0])
    weights = [layer.weight_copy() for layer in fggm_layers(model, "default").values()]
    model.merge_adapter(safe_merge=True)
    bases = [layer.get_base_layer() for layer in fggm_layers(model, "default").values()]
    assert all(hasattr(base, SIDECAR) == (mode == "keep") for base in bases)
    merged = logits(model, BATCHES[0])
    if mode == "keep":
        tolerance = 2e-2 if kind == "int8" else 1e-4  # int8 layers quantize activations in eval mode
        torch.testing.assert_close(merged, before, rtol=tolerance, atol=tolerance)
    assert torch.equal(logits(copy.deepcopy(model), BATCHES[0]), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), before)
    for layer, weight in zip(fggm_layers(model, "default").values(), weights, strict=True):
        assert torch.equal(layer.weight_copy(), weight)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("unload", [False, True])
def test_auto_raises_an_error_instead_of_losing_the_delta(kind, unload):
    model = trained(kind)
    with torch.no_grad():
        for layer in fggm_layers(model, "default").values():
            layer.fggm_values["default"] *= 3e-4
    before = logits(model, BATCHES[0])
    with pytest.raises(LossyMergeError, match=r"\d\.\d% of the delta.*'keep'.*'requantize'"):
        model.merge_and_unload() if unload else model.merge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), before)
    assert not any(layer.merged for layer in fggm_layers(model, "default").values())


def test_the_survived_share_agrees_with_the_weights():
    model = trained("nf4", quantized_merge="requantize")
    layers = fggm_layers(model, "default")
    before = {name: layer.weight_copy() for name, layer in layers.items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    records = {name: layer.quantized_replacement(["default"], safe=False)[1] for name, layer in layers.items()}
    model.merge_adapter()
    for name, module in records.items():
        change, delta = layers[name].weight_copy() - before[name], deltas[name]
        assert module.survived == pytest.approx(float((change * delta).sum() / delta.square().sum()), rel=1e-3)
        assert module.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sidecar_deltas_add_up_exactly_on_one_support(kind, granularity):
    model = quantized(llama(), kind)
    total, base_weight = 0, None
    for seed in range(3):
        config = FGGMConfig(granularity=granularity, criterion="random", seed=seed, quantized_merge="keep")
        model = get_peft_model(model, config)
        train(model, BATCHES, steps=2)
        layer = fggm_layers(model, "default")["model.layers.0.mlp.up_proj"]
        base_weight = layer.weight_copy() if base_weight is None else base_weight
        total = total + layer.get_delta_weight("default")
        model = model.merge_and_unload()
    model = get_peft_model(model, FGGMConfig())
    layer = fggm_layers(model, "default")["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close(layer.weight_copy(), base_weight + total)
    kept = layer.base_layer.fggm_sidecar.deltas
    assert len(kept) == 1 and torch.equal(kept[0].indices, kept[0].indices.unique())
    assert not any("fggm" in name for name in model.base_model.model.state_dict() if "base_layer" in name)


def test_the_sidecar_stays_when_the_next_task_is_requantized():
    model = trained("nf4", quantized_merge="keep").merge_and_unload()
    model = get_peft_model(model, FGGMConfig(granularity="column", criterion="random", quantized_merge="requantize"))
    train(model, BATCHES, steps=3)
    before = logits(model, BATCHES[0])
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BATCHES[0]), before, rtol=0.5, atol=0.5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autocast_does_not_change_the_dtype_of_the_product(kind, granularity):
    """bitsandbytes returns the dtype of the input, regardless of autocast."""
    model = adapted(kind, granularity, criterion="random", init_weights=False, quantized_merge="keep")
    short = {key: value[:1] for key, value in BATCHES[0].items()}  # few positions use the additive form
    exact = logits(model, short)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model, short).float(), exact, rtol=0.1, atol=0.1)
        model.train()
        model(**BATCHES[0]).loss.backward()
        kept = model.merge_and_unload()
        torch.testing.assert_close(logits(kept, short).float(), exact, rtol=0.1, atol=0.1)


def test_saving_a_base_with_a_sidecar_warns_that_it_is_not_saved():
    base = trained("nf4", quantized_merge="keep").merge_and_unload()
    with pytest.warns(UserWarning, match="of the base omit the deltas"):
        base.state_dict()


def test_quantized_embeddings_are_rejected_by_name():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bitsandbytes.nn.Embedding4bit(64, 64).to("cpu"))
    with pytest.raises(TypeError, match=r"Embedding4bit.*Supported are"):
        get_peft_model(base, FGGMConfig(target_modules=["0"]))


def test_all_quantized_layers_have_one_class():
    names = {type(m).__name__ for k in QUANTIZATIONS for m in adapted(k).modules() if isinstance(m, FGGMLayer)}
    assert names == {"FGGMLinear"}
