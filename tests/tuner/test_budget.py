"""The forms of a budget on layers and models, and bounds on single modules."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BERT_HEADS, adapted, bert, fggm_layers, gpt2, llama, quantized, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fggm_peft import FGGMConfig, ParameterBudget, ScoreMass, TopDensity, select_parameters
from fggm_peft.core.threshold import POLICIES


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def chosen(model: nn.Module) -> dict[str, int]:
    return {name: len(layer.fggm_indices["default"]) for name, layer in fggm_layers(model, "default").items()}


# Forms of a budget -------------------------------------------------------------------------------


def test_a_lora_budget_equals_the_size_of_pefts_lora_on_every_layer_type(example, adapt):
    model = adapt(example.layer(), density=None, budget="lora:r=2")
    wrapped = nn.Sequential()
    wrapped.layer = example.layer()
    try:
        lora = get_peft_model(wrapped, LoraConfig(r=2, target_modules=["layer"]))
    except ValueError:
        pytest.skip("LoRA does not support this type of layer")
    assert model.peft_config["default"].resolved_budget == trainable(lora)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (llama, "all-linear"),
        (lambda: quantized(llama(), "nf4"), "all-linear"),
        (gpt2, ["c_attn", "wte"]),
        (lambda: bert(BERT_HEADS["token"]), ["query", "dense", "word_embeddings"]),
    ],
)
def test_a_lora_budget_equals_the_size_of_pefts_lora_on_models(rank, build, targets):
    lora = get_peft_model(build(), LoraConfig(r=rank, target_modules=targets))
    model = adapted(build(), budget=f"lora:r={rank}", target_modules=targets)
    assert model.peft_config["default"].resolved_budget == trainable(lora)


def test_a_rank_that_pefts_lora_rejects_is_rejected(layer_examples, adapt):
    layer = layer_examples["conv2d grouped"].layer()
    with pytest.raises(ValueError, match="divisible by 2"):
        adapt(layer, density=None, budget="lora:r=3")
    wrapped = nn.Sequential()
    wrapped.layer = layer
    with pytest.raises(ValueError, match="divisible by groups"):
        get_peft_model(wrapped, LoraConfig(r=3, target_modules=["layer"]))


@pytest.mark.parametrize(("share", "of"), [("1%", 100), ("2.5 %", 40), ("100%", 1)])
def test_a_percentage_counts_the_entries_of_the_targeted_weights(share, of):
    model = adapted(llama(), budget=share)
    layers = fggm_layers(model, "default").values()
    assert model.peft_config["default"].resolved_budget == sum(x.get_base_layer().weight.numel() for x in layers) // of


def test_the_case_of_a_budget_does_not_matter():
    values = [adapted(llama(), budget=budget).peft_config["default"] for budget in ("LoRA:R=2", "lora:r=2")]
    assert values[0].resolved_budget == values[1].resolved_budget
    assert values[0].budget == "LoRA:R=2"


def test_a_number_is_equivalent_to_a_parameter_budget(granularity):
    models = [
        adapted(llama(), granularity, criterion="random", **config)
        for config in ({"budget": 3000}, {"threshold": ParameterBudget(3000)})
    ]
    assert chosen(models[0]) == chosen(models[1])
    assert 3000 - 96 < trainable(models[0]) <= 3000
    assert models[0].peft_config["default"].resolved_budget == 3000


quick = settings(max_examples=12, deadline=None)


@quick
@given(share=st.integers(2, 1000), most=st.none() | st.integers(1, 40))
@pytest.mark.parametrize("unit", ["row", "column", "element"])
def test_a_budget_is_used_up_to_less_than_one_unit_and_never_exceeded(unit, share, most):
    total = 61440 if most is None else 0
    if most is not None:
        total = sum(min(most, n) * cost for n, cost in unit_counts(unit))
    budget = min(total, max(96, total * share // 1000))
    model = adapted(llama(), unit, criterion="random", budget=budget, max_units=most)
    assert budget - 96 < trainable(model) <= budget
    assert max(chosen(model).values()) <= (most or budget)


def unit_counts(granularity: str) -> list[tuple[int, int]]:
    """(units, values of a unit) of every targeted weight of the small Llama."""
    layers = fggm_layers(adapted(llama(), granularity), "default").values()
    return [
        (
            layer.granularity["default"].units(layer.weight_shape),
            layer.granularity["default"].parameters_per_unit(layer.weight_shape),
        )
        for layer in layers
    ]


# The saved config --------------------------------------------------------------------------------


def test_the_saved_config_contains_the_budget_as_given_and_as_resolved(tmp_path):
    model = adapted(llama(), budget="2%", max_units=8)
    select_parameters(model, token_batches(), progress=False)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["budget"], saved["resolved_budget"]) == ("2%", 61440 // 50)
    assert (saved["max_units"], saved["density"]) == (8, None)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert chosen(loaded) == chosen(model)
    assert loaded.peft_config["default"].policy() == ParameterBudget(61440 // 50)
    assert f"count {61440 // 50}" in (tmp_path / "README.md").read_text()


def test_a_config_is_resolved_again_for_a_second_model():
    config = FGGMConfig(budget="1%", target_modules=["q_proj"])
    first = get_peft_model(llama(), config).peft_config["default"].resolved_budget
    second = get_peft_model(llama(layers=4), config).peft_config["default"].resolved_budget
    assert (first, second) == (2 * 64 * 64 // 100, 4 * 64 * 64 // 100)


@pytest.mark.parametrize("name", list(POLICIES))
def test_max_units_bounds_every_module_with_every_policy(name):
    threshold = ParameterBudget(2000) if name == "parameter_budget" else POLICIES[name]()
    free = adapted(llama(), threshold=threshold)
    bounded = adapted(llama(), threshold=threshold, max_units=4)
    for model in (free, bounded):
        select_parameters(model, token_batches(), progress=False)
    assert max(chosen(free).values()) > 4 == max(chosen(bounded).values())
    if threshold.scope == "layer":
        for a, b in zip(*(fggm_layers(m, "default").values() for m in (free, bounded)), strict=True):
            assert set(b.fggm_indices["default"].tolist()) <= set(a.fggm_indices["default"].tolist())


def test_max_units_also_bounds_modules_of_density_pattern():
    model = adapted(llama(), density_pattern={"q_proj": 1.0}, max_units=5, criterion="random")
    assert set(chosen(model).values()) == {5}


# Errors ------------------------------------------------------------------------------------------

forms = "number of values.*'1%'.*'lora:r=16'"
BAD = [
    *[({"budget": v}, rf"budget must be of type .*int, str.*, got {re.escape(repr(v))}") for v in (True, 1.5, ["1%"])],
    *[
        ({"budget": v}, rf"budget must be.*{forms}, got {re.escape(repr(v))}")
        for v in (
            *(0, -1, "", "5", "5MiB", "1 %%", "nan%", "200B", "lora:16", "lora:r=1.5", "1e6", " 1%"),
            *("0%", "0.00%", "-1%", "150%", "100.1 %"),
            *("lora:r=0", "lora:r=-1", "LoRA:r=0"),
        )
    ],
    ({"budget": "1%", "density": 0.1}, r"give budget \('1%'\) or density \(0.1\), not both"),
    ({"budget": "1%", "threshold": ScoreMass()}, r"give budget \('1%'\) or threshold \(ScoreMass.*not both"),
    ({"budget": "1%", "density_pattern": {"q": 0.1}}, "cannot be combined with budget"),
    *[({"max_units": v}, f"max_units must be an integer > 0 or None, got {v!r}") for v in (0, -1)],
    *[({"max_units": v}, f"max_units must be of type .*int.*, got {v!r}") for v in (1.5, True, "8")],
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(arguments) for arguments, _ in BAD])
def test_an_invalid_value_raises_an_error_with_the_value_and_the_valid_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        FGGMConfig(**arguments)


@pytest.mark.parametrize("budget", [63, "0.1%", "lora:r=999", 10**9])
def test_an_impossible_budget_raises_an_error_with_the_minimum_and_the_maximum(budget):
    base = llama()
    with pytest.raises(ValueError, match=r"a budget of \d+ values.* at least 64 \(one unit.* at most 61440"):
        adapted(base, budget=budget)
    assert not fggm_layers(base, "default")  # the model is unchanged


def test_a_budget_above_max_units_raises_an_error_that_names_the_bound():
    with pytest.raises(ValueError, match=r"at most \d+ \(.*at most 2 units each\)"):
        adapted(llama(), budget=5000, max_units=2)


def test_a_percentage_budget_cannot_be_resolved_without_a_model():
    assert FGGMConfig(budget=7).policy() == ParameterBudget(7)
    with pytest.raises(ValueError, match="when the adapter is added to a model"):
        FGGMConfig(budget="1%").policy()
    assert FGGMConfig().policy() == TopDensity(0.3)
