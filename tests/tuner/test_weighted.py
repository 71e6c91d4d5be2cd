"""Combined adapters against PEFT's merge functions on dense deltas."""

from __future__ import annotations

import pytest
import torch
from models import fggm_layers, llama, logits, token_batches
from peft import get_peft_model
from peft.utils import merge_utils
from reference import KINDS, dense_delta
from safetensors.torch import load_file
from torch import nn

from fggm_peft import FGGMConfig
from fggm_peft.tuner.several.weighted import COMBINATIONS

PEFT_FUNCTIONS = {
    "linear": lambda tensors, weights, density, sign: merge_utils.task_arithmetic(tensors, weights),
    "magnitude_prune": lambda tensors, weights, density, sign: merge_utils.magnitude_prune(tensors, weights, density),
    "ties": merge_utils.ties,
    "dare_linear": lambda tensors, weights, density, sign: merge_utils.dare_linear(tensors, weights, density),
    "dare_ties": merge_utils.dare_ties,
}


def with_adapters(base: nn.Module, granularities, density=0.3, **config):
    """Adapters "a", "b" ... with random supports, values and scales."""
    model = base
    for number, (name, granularity) in enumerate(zip("abc", granularities, strict=False)):
        options = {"criterion": "random", "density": density, "init_weights": False, "seed": number} | config
        if number:
            model.add_adapter(name, FGGMConfig(granularity=granularity, **options))
        else:
            model = get_peft_model(model, FGGMConfig(granularity=granularity, **options), adapter_name=name)
        for layer in fggm_layers(model, name).values():
            layer.set_scale(name, 1 + number / 2)
    return model


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6))


def dense(layer, name: str) -> torch.Tensor:
    """``[o, i]`` float32."""
    delta = layer.delta(name)
    matrix = dense_delta(delta.granularity.name, layer.weight_shape, delta.indices, delta.values.detach())
    return (matrix * delta.scale).float()


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -0.3, 2.0]], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("granularities", [*[[kind] * 3 for kind in KINDS], KINDS], ids=str)
@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if not name.startswith("dare")])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_a_combination_agrees_with_pefts_functions_on_dense_deltas(combination, granularities, density, weights, sign):
    model = with_adapters(small(), granularities, target_modules=["0", "2"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.add_weighted_adapter(list("abc"), weights, "sum", combination, density, sign)
    layers = fggm_layers(model, "sum")
    assert set(layers) == {"0", "2"}
    for layer in layers.values():
        tensors = [dense(layer, name) for name in "abc"]
        expected = PEFT_FUNCTIONS[combination](tensors, torch.tensor(weights), density, sign)
        torch.testing.assert_close(dense(layer, "sum"), expected)
        assert layer.granularity["sum"].name == (granularities[0] if len(set(granularities)) == 1 else "element")
        assert not layer.fggm_values["sum"].requires_grad
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if name.startswith("dare")])
def test_random_pruning_of_full_supports_draws_the_same_entries_as_peft(combination, granularity):
    model = with_adapters(small(), [granularity] * 2, density=1.0, target_modules=["2"])
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], [0.7, -1.2], "sum", combination, density=0.4)
    (layer,) = fggm_layers(model, "sum").values()
    torch.manual_seed(3)
    tensors = [dense(layer, name) for name in "ab"]
    expected = PEFT_FUNCTIONS[combination](tensors, torch.tensor([0.7, -1.2]), 0.4, "total")
    torch.testing.assert_close(dense(layer, "sum"), expected)


def test_random_pruning_of_sparse_deltas_keeps_its_share_and_the_expected_value():
    base = nn.Sequential(nn.Linear(100, 100))
    model = with_adapters(base, ["row", "element"], density=0.5, target_modules=["0"])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "all", "linear")
    for number in range(200):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], f"s{number}", "dare_linear", density=0.25)
    (layer,) = fggm_layers(model, "all").values()
    alive = 0.5 * 0.25  # each delta covers half of the weight, and pruning retains a quarter of it
    assert abs(len(layer.fggm_indices["s0"]) / 10_000 - (1 - (1 - alive) ** 2)) < 0.02
    mean = sum(dense(layer, f"s{number}") for number in range(200)) / 200
    expected = dense(layer, "all")
    assert float((mean - expected).norm() / expected.norm()) < 0.2  # sqrt((1 - 0.25) / 0.25 / 200) = 0.12


def test_values_stay_float32_on_a_half_precision_base(granularity):
    model = with_adapters(small().bfloat16(), [granularity] * 2, target_modules=["0"])
    model.add_weighted_adapter(["a", "b"], [1.0, 0.3], "sum")
    (layer,) = fggm_layers(model, "sum").values()
    assert layer.fggm_values["sum"].dtype == torch.float32
    torch.testing.assert_close(dense(layer, "sum"), dense(layer, "a") + 0.3 * dense(layer, "b"))


def test_a_linear_combination_gives_the_sum_of_its_adapters():
    model = with_adapters(llama(), KINDS)
    model.add_weighted_adapter(list("abc"), [1.0, 1.0, 1.0], "sum")
    model.base_model.set_adapter(list("abc"))
    batch = token_batches()[0]
    expected = logits(model, batch)
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_minus_itself_is_saved_without_entries(granularity, tmp_path):
    model = with_adapters(small(), [granularity], target_modules=["0"])
    model.add_weighted_adapter(
        ["a"], [-2.0], "negated", "ties", density=0.1
    )  # for a single adapter only its weight matters
    (layer,) = fggm_layers(model, "negated").values()
    torch.testing.assert_close(dense(layer, "negated"), -2 * dense(layer, "a"))
    model.add_weighted_adapter(["a", "negated"], [2.0, 1.0], "nothing")
    assert not layer.fggm_indices["nothing"].numel() and layer.selected["nothing"]
    model.set_adapter("nothing")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "nothing" / "adapter_model.safetensors")
    assert not any(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("combination", ["linear", "ties"])
def test_a_combination_contains_modules_of_only_one_adapter(combination):
    model = get_peft_model(
        small(), FGGMConfig(target_modules=["0"], criterion="random", init_weights=False), adapter_name="a"
    )
    model.add_adapter("b", FGGMConfig(target_modules="2", criterion="random", init_weights=False, granularity="column"))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", combination, density=1.0)
    first, last = (model.base_model.model[place] for place in (0, 2))
    torch.testing.assert_close(dense(first, "sum"), dense(first, "a"))
    torch.testing.assert_close(dense(last, "sum"), 0.5 * dense(last, "b"))


def test_modules_to_save_of_one_adapter_are_copied_and_of_two_are_rejected():
    config = {"target_modules": ["0"], "criterion": "random", "init_weights": False}
    model = get_peft_model(small(), FGGMConfig(modules_to_save=["2"], **config), adapter_name="a")
    model.add_adapter("b", FGGMConfig(**config))
    wrapper = model.base_model.model[2]
    nn.init.normal_(wrapper.modules_to_save["a"].weight)
    model.add_weighted_adapter(["b", "a"], [1.0, 1.0], "sum")
    assert torch.equal(wrapper.modules_to_save["sum"].weight, wrapper.modules_to_save["a"].weight)
    model.add_adapter("c", FGGMConfig(modules_to_save=["2"], **config))
    with pytest.raises(ValueError, match=r"same module with modules_to_save, but found 1 such"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "z"], [1.0, 1.0], "new"), "Adapter z does not exist"),
        ((["a", "empty"], [1.0, 1.0], "new"), "'empty' has no support yet"),
        ((["a", "b"], [1.0], "new"), "one weight for each adapter, got 1"),
        (([], [], "new"), "one weight for each adapter"),
        ((["a", "b"], [1.0, 1.0], "new", "svd"), "combination_type must be one of 'linear', .* got 'svd'"),
        ((["a", "b"], [1.0, 1.0], "new", "ties"), r"'ties' keeps the share `density`.*got None"),
        ((["a", "b"], [1.0, 1.0], "new", "dare_ties", 1.5), r"in \(0, 1\], got 1.5"),
        ((["a", "b"], [1.0, 1.0], "new", "ties", 0.5, "loudest"), "majority_sign_method must be one of"),
    ],
)
def test_an_invalid_combination_raises_an_error_and_does_not_change_the_model(arguments, message):
    model = with_adapters(small(), ["row"] * 2, target_modules=["0"])
    model.add_adapter("empty", FGGMConfig(target_modules=["0"]))
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == keys and "new" not in model.peft_config


def test_a_combination_of_adapters_without_a_support_has_none(granularity):
    model = get_peft_model(small(), FGGMConfig(target_modules=["0"], granularity=granularity), adapter_name="a")
    model.add_adapter("b", FGGMConfig(target_modules=["2"], granularity=granularity))
    with pytest.warns(UserWarning, match=r"none of \['a', 'b'\] has a support yet, so 'sum' has none"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    layers = fggm_layers(model, "sum")
    assert list(layers) == ["0", "2"] and not any(layer.selected["sum"] for layer in layers.values())


def test_an_existing_adapter_is_not_overwritten():
    model = with_adapters(small(), ["row"] * 2, target_modules=["0"])
    before = dense(model.base_model.model[0], "b")
    with pytest.warns(UserWarning, match="'b' exists already"):
        model.add_weighted_adapter(["a"], [1.0], "b")
    assert torch.equal(dense(model.base_model.model[0], "b"), before)


def test_a_combination_can_be_saved_and_loaded(tmp_path):
    model = with_adapters(llama(), KINDS, density=0.1)
    model.add_weighted_adapter(list("abc"), [1.0, 0.5, -1.0], "sum", "ties", density=0.05)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = get_peft_model(llama(), FGGMConfig(criterion="random"))
    loaded.load_adapter(tmp_path / "sum", "sum")
    loaded.set_adapter("sum")
    batch = token_batches()[0]
    assert torch.equal(logits(loaded, batch), logits(model, batch))
