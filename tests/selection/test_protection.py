"""Protection: a new support avoids the supports of earlier deltas."""

from __future__ import annotations

import pytest
import torch
from models import adapted, fggm_layers, llama, quantized, token_batches, train
from peft import PeftModel, get_peft_model
from reference import mask
from safetensors.torch import load_file, save_file

from fggm_peft import (
    AdapterFileError,
    FGGMConfig,
    MeanPlusStd,
    ParameterBudget,
    ScoreMass,
    TopDensity,
    select_parameters,
)
from fggm_peft.core.granularity import GRANULARITIES, granularity_from
from fggm_peft.selection.protection import Protection, earlier_supports
from fggm_peft.tuner.target import find_targets

FIRST, SECOND = token_batches(seed=1), token_batches(seed=2)


def select(model, batches=SECOND, **arguments):
    return select_parameters(model, batches, progress=False, **arguments)


def supports(model, name="default"):
    return {module: layer.fggm_indices[name] for module, layer in fggm_layers(model, name).items()}


def masks(model, name="default"):
    """Module path -> ``[o, i]``, True for entries in the support."""
    return {
        module: mask(layer.granularity[name].name, layer.weight_shape, layer.fggm_indices[name])
        for module, layer in fggm_layers(model, name).items()
    }


def saved(folder, granularity="row", density=0.3, base=None, **config):
    """Save a trained adapter; returns the masks of its support."""
    model = adapted(llama() if base is None else base, granularity, density=density, **config)
    select(model, FIRST)
    train(model, FIRST)
    model.save_pretrained(folder)
    return masks(model)


@pytest.mark.parametrize("criterion", ["fisher", "weight_magnitude"])
def test_full_protection_makes_supports_disjoint(granularity, criterion, tmp_path):
    held = saved(tmp_path / "first", granularity, criterion=criterion)
    model = adapted(llama(), granularity, density=0.3, criterion=criterion, protect=[str(tmp_path / "first")])
    assert not any(len(indices) for indices in supports(model).values())  # it is not selected when it is created
    report = select(model)
    assert report.density == pytest.approx(0.3, abs=0.02)
    for name, moving in masks(model).items():
        assert moving.any() and not (moving & held[name]).any()


def test_a_task_with_a_disjoint_support_can_be_removed_exactly(tmp_path):
    """Of three tasks trained in turn, removing the second gives the weights of the first and third."""
    base, merged = llama(), llama()
    deltas = []
    for number in range(3):
        model = adapted(merged, density=0.3, protect=["history"] if number else None)
        select(model, token_batches(seed=number))
        train(model, token_batches(seed=number))
        layers = fggm_layers(model, "default")
        deltas.append(
            {n: (layer.fggm_indices["default"].long(), layer.delta("default")) for n, layer in layers.items()}
        )
        merged = model.merge_and_unload()
    for name in deltas[0]:
        expected = base.get_submodule(name).weight.detach().clone()
        for delta in (deltas[0][name][1], deltas[2][name][1]):
            delta.granularity.add_(expected, delta.indices, delta.values.detach())
        without = merged.get_submodule(name).weight.detach().clone()
        rows = deltas[1][name][0]
        assert not torch.equal(without[rows], base.get_submodule(name).weight[rows])
        without[rows] = base.get_submodule(name).weight.detach()[rows]
        assert torch.equal(without, expected)


def test_partial_protection_reduces_scores(granularity):
    model = adapted(llama(), granularity)
    targets = find_targets(model, "default")
    name, target = next(iter(targets.items()))
    kind = granularity_from(granularity)
    guard = Protection(targets, 0.75, {name: [(kind, torch.tensor([0, 3], dtype=torch.int32))]})
    scores = torch.ones(target.units)
    expected = scores.clone()
    expected[[0, 3]] = 0.25
    assert torch.equal(guard.applied(name, scores), expected)
    assert torch.equal(guard.applied("another", scores), scores)
    none = Protection(targets, 0.0, guard.earlier)
    assert torch.equal(none.applied(name, scores), scores)


@pytest.mark.parametrize("new", list(GRANULARITIES))
def test_the_protected_share_of_a_unit_counts_its_entries_in_earlier_deltas(granularity, new):
    model = adapted(llama(), new)
    targets = find_targets(model, "default")
    name, target = next(iter(targets.items()))
    shape, kind = target.shape, granularity_from(granularity)
    lists = [torch.tensor([0, 5, 9], dtype=torch.int32), torch.tensor([5, 7], dtype=torch.int32)]
    held = torch.stack([mask(granularity, shape, indices) for indices in lists]).any(0).double()
    guard = Protection(targets, 1.0, {name: [(kind, indices) for indices in lists]})
    expected = {"row": held.mean(1), "column": held.mean(0), "element": held.flatten()}[new]
    torch.testing.assert_close(guard.share(name).double(), expected, rtol=1e-6, atol=0)


def test_elements_avoid_earlier_rows_and_crossing_units_cause_a_warning(tmp_path):
    held = saved(tmp_path, "row")
    elements = adapted(llama(), "element", density=0.1, protect=[str(tmp_path)])
    select(elements)
    assert not any((moving & held[name]).any() for name, moving in masks(elements).items())
    columns = adapted(llama(), "column", density=0.1, protect=[str(tmp_path)])
    with pytest.warns(UserWarning, match="cannot keep columns apart from earlier deltas that they cross"):
        select(columns)


def test_loaded_adapters_and_folders_can_be_protected_together(tmp_path):
    held = saved(tmp_path)
    model = get_peft_model(llama(), FGGMConfig(density=0.2, target_modules="all-linear"), adapter_name="other")
    select(model, FIRST)
    model.add_adapter("new", FGGMConfig(density=0.2, target_modules="all-linear"))
    model.set_adapter("new")
    select(model, adapter_name="new", protect=["other", str(tmp_path)])
    for name, moving in masks(model, "new").items():
        assert moving.any() and not (moving & (held[name] | masks(model, "other")[name])).any()
    with pytest.raises(ValueError, match="'new' is the adapter that is being selected"):
        select(model, adapter_name="new", protect=["new"])


def test_a_quantized_base_is_protected_too(tmp_path):
    base = quantized(llama(intermediate_size=128), "nf4")
    held = saved(tmp_path, "column", base=base)
    again = quantized(llama(intermediate_size=128), "nf4")
    model = adapted(again, "column", protect=[str(tmp_path)])
    select(model)
    assert not any((moving & held[name]).any() for name, moving in masks(model).items())


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (TopDensity(0.5), r"selects 2048 parameters of model\.layers\.0\.self_attn\.q_proj, .* leaves 1216 of 4096"),
        (TopDensity(0.5, scope="global"), r"of all modules together, .* leaves \d+ of 61440"),
        (ParameterBudget(40_000), r"selects 39\d+ parameters of all modules together, .* leaves \d+ of 61440"),
    ],
)
def test_an_error_says_how_many_parameters_protection_leaves(threshold, message, tmp_path):
    saved(tmp_path, density=0.7)
    model = adapted(llama(), threshold=threshold, protect=[str(tmp_path)])
    with pytest.raises(ValueError, match=message):
        select(model)
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())
    select(model, protection=0.9)


@pytest.mark.parametrize("threshold", [ScoreMass(0.5), MeanPlusStd(0.5)])
def test_an_adaptive_threshold_requires_one_unit_of_each_module(threshold, tmp_path):
    saved(tmp_path / "most", density=0.7)
    select(adapted(llama(), threshold=threshold, protect=[str(tmp_path / "most")]))
    saved(tmp_path / "all", density=1.0)
    with pytest.raises(ValueError, match=r"selects 64 parameters of .* leaves 0 of 4096"):
        select(adapted(llama(), threshold=threshold, protect=[str(tmp_path / "all")]))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def change(edit):
    def write(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return write


def rename(tensors):
    for part in ("values", "indices"):
        tensors[f"base_model.model.other.fggm_{part}"] = tensors.pop(f"{Q}.fggm_{part}")


BAD = {
    "out of range": (change(lambda t: t[f"{Q}.fggm_indices"].fill_(64)), "do not fit the 64"),
    "not sorted": (change(lambda t: t[f"{Q}.fggm_indices"].fill_(3)), "not sorted and unique"),
    "another shape": (change(lambda t: t.update({f"{Q}.fggm_values": torch.ones(19, 5)})), "expected floating-point"),
    "floats for indices": (change(lambda t: t.update({f"{Q}.fggm_indices": torch.ones(19)})), "int32 or int64"),
    "an unknown module": (change(rename), "no shape of other"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 40), "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_deltas_and_deltas_of_another_base_are_rejected(name, tmp_path):
    saved(tmp_path)
    damage, message = BAD[name]
    damage(tmp_path)
    model = adapted(llama(), protect=[str(tmp_path)])
    with pytest.raises(AdapterFileError, match=message):
        select(model)
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())


def test_a_delta_with_other_layer_sizes_is_rejected(tmp_path):
    saved(tmp_path, base=llama(hidden_size=32))
    with pytest.raises(AdapterFileError, match="another base"):
        select(adapted(llama(), protect=[str(tmp_path)]))


def test_protected_modules_that_are_not_targets_are_ignored(tmp_path):
    saved(tmp_path)
    model = adapted(llama(), target_modules=["q_proj"], protect=[str(tmp_path)])
    select(model)
    assert set(earlier_supports(model, model.peft_config["default"], "default", [str(tmp_path)])) > set(supports(model))


def test_another_adapter_type_is_rejected(tmp_path):
    from peft import LoraConfig

    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a .*LORA adapter, not FGGM"):
        select(adapted(llama(), protect=[str(tmp_path)]))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "1", True])
def test_protection_must_be_a_number_from_0_to_1(value):
    with pytest.raises(ValueError, match=r"protection must be in \[0, 1\]"):
        FGGMConfig(protection=value)
    with pytest.raises(ValueError, match=r"protection must be in \[0, 1\]"):
        select(adapted(llama()), protection=value)


def test_an_adapter_loads_without_the_deltas_that_it_protected(tmp_path):
    saved(tmp_path / "first", criterion="weight_magnitude")
    model = adapted(llama(), criterion="weight_magnitude", protect=[str(tmp_path / "first")])
    select(model)
    model.save_pretrained(tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "gone")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "second")
    assert all(torch.equal(a, b) for a, b in zip(supports(loaded).values(), supports(model).values(), strict=True))
