"""FGGM in a ``PeftMixedModel``; ``test_upstream_mixed_model`` runs these tests with a patched PEFT."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from models import fggm_layers, llama, logits, mixture, quantized, token_batches, train
from peft import IA3Config, LoraConfig, OFTConfig, PeftMixedModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from reference import dense_delta, relative_error
from torch import Tensor, nn

from fggm_peft import FGGMConfig, select_parameters

BATCHES = token_batches()
LOW_RANK = ["q_proj", "up_proj"]
MODULES = {"other modules": ["k_proj", "down_proj"], "the same modules": LOW_RANK}


def round_(parameters: Iterable[nn.Parameter]) -> None:
    """Round to multiples of 1/64, so that float64 sums and products of a few factors are exact."""
    for parameter in parameters:
        parameter.data = (parameter.data * 64).round() / 64


def mixed_model(modules: list[str], granularity: str = "element", first: str = "lora") -> PeftMixedModel:
    """A model with LoRA ("low_rank") and FGGM ("sparse"), both active and trained a few steps; weights are rounded."""
    base = llama(torch.float64)
    round_(base.parameters())
    configs = {
        "low_rank": LoraConfig(target_modules=LOW_RANK, init_lora_weights=False),
        "sparse": FGGMConfig(granularity=granularity, target_modules=modules, density=0.2),
    }
    names = ["low_rank", "sparse"] if first == "lora" else ["sparse", "low_rank"]
    model = get_peft_model(base, configs[names[0]], names[0], mixed=True)
    model.add_adapter(names[1], configs[names[1]])
    report = select_parameters(model, BATCHES, adapter_name="sparse", progress=False)
    assert len(report.modules) == 2 * len(modules)
    model.set_adapter(names)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "fggm_" in name} == {"sparse"}
    assert any("lora_A" in name for name in trained) and all("lora_" in n or "fggm_" in n for n in trained)
    before = {name: p.detach().clone() for name, p in trained.items()}
    losses = train(model, BATCHES[:1])
    assert losses[-1] < losses[0] and not any(torch.equal(p, before[name]) for name, p in trained.items())
    round_(trained.values())
    return model.eval()


def path_of(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if "lora_" not in n and "fggm_" not in n}
    return {path_of(name): p.detach().clone() for name, p in parameters.items()}


def deltas(model: PeftMixedModel, adapter: str) -> dict[str, Tensor]:
    """Name of the weight -> its dense delta, from the adapter's tensors."""
    if adapter == "low_rank":
        layers = {path_of(name): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        factors = {name: (m.lora_B[adapter].weight, m.lora_A[adapter].weight) for name, m in layers.items()}
        return {f"{name}.weight": (b @ a * layers[name].scaling[adapter]).detach() for name, (b, a) in factors.items()}
    return {
        f"{path_of(path)}.weight": dense_delta(
            str(layer.granularity[adapter]), layer.weight_shape, layer.fggm_indices[adapter], layer.fggm_values[adapter]
        ).detach()
        for path, layer in fggm_layers(model, adapter).items()
    }


def reference(model: PeftMixedModel, weights: dict[str, Tensor], adapters: list[str]) -> nn.Module:
    """A model without adapters, whose weights are those of the base plus the dense deltas."""
    plain = llama(torch.float64)
    state = {name: weight.clone() for name, weight in weights.items()}
    for adapter in adapters:
        for name, delta in deltas(model, adapter).items():
            state[name] += delta
    plain.load_state_dict(state)
    return plain


def assert_same_output(model: nn.Module, expected: nn.Module) -> None:
    assert relative_error(logits(model, BATCHES[0]), logits(expected, BATCHES[0])) < 1e-11


@pytest.mark.parametrize("first", ["lora", "fggm"])
@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_lora_and_fggm_train_together_and_give_the_dense_reference(modules, first):
    model = mixed_model(modules, first=first)
    weights = base_weights(model)
    both = ["low_rank", "sparse"]
    for adapters in (["low_rank"], ["sparse"], both):
        model.set_adapter(adapters)
        assert_same_output(model, reference(model, weights, adapters))
        assert {n for n, p in model.named_parameters() if p.requires_grad and "base_layer.weight" in n} == set()
    with model.disable_adapter():
        assert_same_output(model, reference(model, weights, []))
    expected = reference(model, weights, both)
    merged = model.merge_and_unload()
    assert type(merged) is type(expected)
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name])


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
@pytest.mark.parametrize("first", ["lora", "fggm"])
def test_unmerging_restores_the_base_bit_for_bit_even_of_nested_layers(first, granularity):
    model = mixed_model(LOW_RANK, granularity, first)
    weights = base_weights(model)
    expected = reference(model, weights, ["low_rank", "sparse"])
    undo = {
        "unmerge_adapter": model.unmerge_adapter,
        "set_adapter": lambda: model.set_adapter(["low_rank", "sparse"]),
        "disable_adapter": lambda: disabled_forward(model),
    }
    for name, restore in undo.items():
        model.merge_adapter()
        merged = base_weights(model)
        for key, weight in expected.state_dict().items():
            assert torch.equal(merged[key], weight), name
        restore()
        after = base_weights(model)
        assert all(torch.equal(after[key], weight) for key, weight in weights.items()), name


def disabled_forward(model: PeftMixedModel) -> None:
    with model.disable_adapter():
        logits(model, BATCHES[0])


def test_a_deleted_adapter_leaves_the_other():
    model = mixed_model(LOW_RANK)
    weights = base_weights(model)
    expected = reference(model, weights, ["low_rank"])
    model.delete_adapter("sparse")
    assert list(model.peft_config) == ["low_rank"]
    assert_same_output(model, expected)


def test_a_saved_fggm_adapter_loads_beside_lora(tmp_path):
    config = FGGMConfig(criterion="random", density=0.2, init_weights=False, target_modules=["k_proj"])
    source = get_peft_model(llama(), config)
    source.save_pretrained(tmp_path)
    model = get_peft_model(llama(), LoraConfig(target_modules=LOW_RANK), "low_rank", mixed=True)
    model.load_adapter(tmp_path, "sparse")
    model.set_adapter("sparse")
    assert torch.equal(logits(model, BATCHES[0]), logits(source, BATCHES[0]))
    first = PeftMixedModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(first, BATCHES[0]), logits(source, BATCHES[0]))


def test_parameters_without_a_layer_are_rejected_and_leave_the_model_as_it_was():
    model = get_peft_model(mixture("Mixtral"), LoraConfig(target_modules=["q_proj"]), "low_rank", mixed=True)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"experts\.down_proj: a mixed model supports FGGM neither on parameters"):
        model.add_adapter("sparse", FGGMConfig(target_parameters=["experts.down_proj"], target_modules=["k_proj"]))
    assert list(model.peft_config) == ["low_rank"] and [name for name, _ in model.named_parameters()] == names


def test_quantized_layers_are_rejected():
    model = quantized(llama(), "int8")
    with pytest.raises(ValueError, match=r"q_proj: a mixed model supports FGGM neither"):
        get_peft_model(model, FGGMConfig(target_modules=["q_proj"]), "sparse", mixed=True)


def test_a_config_without_targets_targets_all_linear_layers():
    model = get_peft_model(llama(), FGGMConfig(), "sparse", mixed=True)
    assert len(fggm_layers(model, "sparse")) == 14


def test_a_pattern_matches_the_paths_of_the_base_model_for_every_adapter():
    pattern = r"model\.layers\.0\..*q_proj"
    model = get_peft_model(llama(), LoraConfig(target_modules=pattern), "low_rank", mixed=True)
    model.add_adapter("second", LoraConfig(target_modules=pattern))
    model.add_adapter("sparse", FGGMConfig(target_modules=pattern))
    assert list(fggm_layers(model, "sparse")) == ["model.layers.0.self_attn.q_proj"]


def test_pefts_own_methods_also_merge_from_the_inside():
    """OFT multiplies the weight, so that merging OFT before LoRA would give another weight."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)).double(), LoraConfig(target_modules=["0"], init_lora_weights=False), mixed=True
    )
    model.add_adapter("rotated", OFTConfig(target_modules=["0"], oft_block_size=4, init_weights=False))
    model.set_adapter(["default", "rotated"])
    x, weight = torch.randn(3, 16).double(), model.base_model.model[0].get_base_layer().weight
    before, expected = weight.detach().clone(), model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before)


def test_the_methods_that_are_registered_as_mixed_compatible_are_those_that_peft_listed():
    """PEFT's list is that of 0.21.2; four more methods were registered as compatible, and OFT was not."""
    assert set(COMPATIBLE_TUNER_TYPES) == {"LORA", "LOHA", "LOKR", "ADALORA", "OFT", "SHIRA", "FGGM"}
    with pytest.raises(ValueError, match="'IA3' is not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), IA3Config(), mixed=True)
