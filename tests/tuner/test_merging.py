"""Merging into dense bases is exact, reversible bit for bit, and checked before the model changes."""

from __future__ import annotations

import pytest
import torch
from models import fggm_layers, llama, logits, token_batches, train
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from reference import TOLERANCE, relative_error
from torch import nn

from fggm_peft import FGGMConfig, MergeReport
from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.weight_delta import WeightDelta
from fggm_peft.deltas import apply_deltas
from fggm_peft.tuner.merging import merge as merging

BATCHES = token_batches(sizes=(5, 4, 5))  # enough positions to use the effective weight


def trained(granularity: str, dtype: torch.dtype = torch.float32, adapters=("default",), **config):
    model = get_peft_model(llama(dtype), FGGMConfig(granularity=granularity, criterion="random", **config))
    for seed, name in enumerate(adapters[1:], start=1):
        model.add_adapter(name, FGGMConfig(granularity=granularity, criterion="random", seed=seed, **config))
    for name in adapters:
        model.set_adapter(name)
        train(model, BATCHES, steps=2)
    return model


def base_state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "fggm_" not in name}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_gives_the_outputs_of_the_trained_model(granularity, dtype):
    model = trained(granularity, dtype)
    model.eval()
    before = logits(model, BATCHES[0])
    merged = model.merge_and_unload()
    after = logits(merged, BATCHES[0])
    if granularity == "column" and dtype == torch.bfloat16:  # the sum of two products is rounded twice
        assert relative_error(after, before) < TOLERANCE[dtype]
    else:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert not any("fggm" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_is_bit_exact_over_many_cycles_and_adapters(granularity, dtype):
    model = trained(granularity, dtype, adapters=("default", "second"))
    before = base_state(model)
    for cycle in range(50):
        model.merge_adapter(["default"] if cycle % 2 else ["default", "second"])
        if cycle % 3 == 0:
            with pytest.warns(UserWarning, match="(?i)already"):
                model.merge_adapter(["second", "default"])
        assert not torch.equal(base_state(model)[next(iter(fggm_names(model)))], before[next(iter(fggm_names(model)))])
        model.unmerge_adapter()
    assert_same_state(base_state(model), before)


def test_a_change_of_the_active_adapter_restores_tied_layers_and_layers_around_others(granularity):
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    around = nn.Sequential(nn.Linear(8, 8))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), around, "low_rank")
    around[0].lora_A.low_rank.weight.data = torch.eye(8)
    around[0].lora_B.low_rank.weight.data = torch.eye(8)
    for base in (tied, around):
        weight = base[0].weight
        weight.data = torch.randint(8, (8, 8)).float()  # adding LoRA's delta of ones is exact
        before = weight.detach().clone()
        config = FGGMConfig(granularity=granularity, criterion="random", density=0.5, init_weights=False)
        config.target_modules = r"\d"
        model = get_peft_model(base, config)
        model.merge_adapter()
        assert not torch.equal(weight, before)
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.set_adapter("default")
        model.unmerge_adapter()  # LoRA's layer
        assert torch.equal(weight, before)


def fggm_names(model):
    return [f"base_model.model.{name}.base_layer.weight" for name in fggm_layers(model, "default")]


def test_each_changed_entry_is_rounded_once(granularity):
    """A bfloat16 base becomes round(weight + delta), where the sum is computed in float32; other entries stay equal."""
    model = trained(granularity, torch.bfloat16)
    layers = fggm_layers(model, "default")
    expected = {
        name: (layer.get_base_weight().float() + layer.get_delta_weight("default")).bfloat16()
        for name, layer in layers.items()
    }
    model.merge_adapter()
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_weight(), expected[name])


def test_merge_and_forward_apply_the_scale(granularity):
    model = trained(granularity)
    for layer in fggm_layers(model, "default").values():
        layer.set_scale("default", -0.5)
    before = logits(model, BATCHES[0])
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BATCHES[0]), before, rtol=1e-5, atol=1e-6)


def test_the_report_contains_the_survived_share_of_the_delta():
    model = trained("row", torch.bfloat16)
    report = apply_deltas(llama(torch.bfloat16), [model])
    assert isinstance(report, MergeReport) and len(report.modules) == 14
    assert {module.outcome for module in report.modules} == {"added"}
    assert 0.95 < report.survived < 1.05 and "14 added" in str(report)
    with torch.no_grad():  # a delta far below the resolution of bfloat16 is lost
        for layer in fggm_layers(model, "default").values():
            layer.fggm_values["default"] *= 1e-6
    report = apply_deltas(llama(torch.bfloat16), [model])
    assert report.survived < 0.05
    assert report.to_dict()["modules"]["model.layers.0.mlp.up_proj"]["survived"] < 0.05


@pytest.mark.parametrize("unload", [False, True])
def test_safe_merge_rejects_nan_before_any_layer_changes(granularity, unload):
    model = trained(granularity)
    last = list(fggm_layers(model, "default").values())[-1]
    with torch.no_grad():
        last.fggm_values["default"].view(-1)[0] = float("nan")
    before = base_state(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert_same_state(base_state(model), before)
    assert not any(layer.merged for layer in fggm_layers(model, "default").values())


def test_original_weights_move_with_the_model_and_are_not_saved(tmp_path):
    model = trained("row", torch.bfloat16)
    before = base_state(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert not any("originals" in name for name in model.state_dict())
    model.float()
    model.unmerge_adapter()
    assert all(torch.equal(a.bfloat16(), before[name]) for name, a in base_state(model).items())


def test_a_new_adapter_trains_on_a_merged_base():
    model = trained("row").merge_and_unload()
    first = logits(model, BATCHES[0])
    again = get_peft_model(model, FGGMConfig(granularity="column", criterion="random"))
    torch.testing.assert_close(logits(again, BATCHES[0]), first)
    losses = train(again, BATCHES[:1], steps=6)
    assert losses[-1] < losses[0]


def test_unload_returns_the_unchanged_base():
    model = trained("element")
    torch.testing.assert_close(logits(model.unload(), BATCHES[0]), logits(llama(), BATCHES[0]), rtol=0, atol=0)


def test_unmerging_restores_a_weight_shared_by_two_adapted_layers(granularity):
    base = llama(tie_word_embeddings=True)
    config = FGGMConfig(granularity=granularity, criterion="random", target_modules=["embed_tokens", "lm_head"])
    config.init_weights = False
    model = get_peft_model(base, config)
    before = base_state(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_state(base_state(model), before)


def test_a_merged_adapter_cannot_be_overwritten_by_loading(tmp_path):
    model = trained("row")
    model.save_pretrained(tmp_path)
    before = base_state(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    assert_same_state(base_state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_merging_gives_the_sum_and_the_record_of_all_entries(granularity, dtype, scale):
    torch.manual_seed(0)
    kind = granularity_from(granularity)
    before = torch.randn(13, 11).to(dtype)
    indices = torch.arange(0, kind.units((13, 11)), 3, dtype=torch.int32)
    delta = WeightDelta(kind, indices, 0.1 * torch.randn(kind.values_shape((13, 11), len(indices))), scale)
    after = before.clone()
    old, new = merging.add_to_dense_(after, delta)
    record = merging.record_of(delta, old, new)
    expected = before.clone()
    kind.add_(expected, indices, delta.values, scale)
    assert torch.equal(after, expected) and torch.equal(old, kind.gather(before, indices))
    change, meant = after.double() - before.double(), torch.zeros(13, 11, dtype=torch.float64)
    kind.add_(meant, indices, delta.values.double(), scale)
    assert record.delta_norm == pytest.approx(float(meant.norm()), rel=1e-5)
    assert record.projection == pytest.approx(float((change * meant).sum()), rel=1e-5)


def test_a_delta_below_float32_resolution_merges_into_float64_and_is_recorded(granularity):
    kind, weight = granularity_from(granularity), torch.randn(5, 4, dtype=torch.float64)
    indices = torch.tensor([1, 3], dtype=torch.int32)
    values = torch.full(kind.values_shape((5, 4), 2), 1e-10, dtype=torch.float64)
    delta = WeightDelta(kind, indices, values, 1.0)
    record = merging.record_of(delta, *merging.add_to_dense_(weight, delta))
    assert record.survived == pytest.approx(1, abs=1e-4)


def test_merging_an_empty_delta_changes_nothing(granularity):
    kind, weight = granularity_from(granularity), torch.randn(5, 4)
    delta = WeightDelta(kind, torch.zeros(0, dtype=torch.int32), torch.zeros(kind.values_shape((5, 4), 0)), 1.0)
    after = weight.clone()
    record = merging.record_of(delta, *merging.add_to_dense_(after, delta))
    assert torch.equal(after, weight) and record.delta_norm == 0 and record.survived == 1
