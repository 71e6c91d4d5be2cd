"""Every registered criterion, for every granularity."""

from __future__ import annotations

import pytest
import torch
from models import adapted, fggm_layers, llama, token_batches
from reference import KINDS, criterion_scores, seeded, unit_scores, units

from fggm_peft import CRITERIA, Criterion, FGGMConfig, ScoreMass, TopDensity, select_parameters
from fggm_peft.core.covariance import Covariance
from fggm_peft.core.criteria import Quantities
from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.harm_decay import InputMetric

SHAPE = (6, 9)
CASES = [
    (name, granularity)
    for name, criterion in CRITERIA._entries.items()
    for granularity in KINDS
    if criterion.supports(granularity_from(granularity))
]


def granularity_of(name: str) -> str:
    """The first granularity that the criterion supports."""
    return next(granularity for criterion, granularity in CASES if criterion == name)


@pytest.fixture
def matrices() -> dict[str, torch.Tensor]:
    generator = seeded(1)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    signed = {name: draw(*SHAPE) - 0.5 for name in ("gradient", "weight")}
    moments = {"input": draw(SHAPE[1]), "reference input": draw(SHAPE[1])}
    return {name: draw(*SHAPE) for name in ("fisher", "reference")} | signed | moments


def quantities(granularity, matrices=None, seed=0, **more):
    """The statistics that a pass collects, computed from dense matrices."""

    def no_weight():
        raise AssertionError("this criterion does not look at the weight")

    if matrices is None:
        return Quantities(granularity_from(granularity), SHAPE, no_weight, seeded(seed), **more)
    unit = lambda name: unit_scores(granularity, matrices[name]).float()  # noqa: E731
    task = {
        "fisher": unit("fisher"),
        "fisher_under_decay": unit("fisher"),
        "input_second_moment": matrices["input"].float(),
    }
    reference = {"fisher": unit("reference"), "input_second_moment": matrices["reference input"].float()}
    means = {
        "fisher": float(matrices["reference"].mean()),
        "input_second_moment": float(matrices["reference input"].mean()),
    }
    source = lambda: matrices["weight"].float()  # noqa: E731
    more["metric"] = InputMetric(Covariance(torch.zeros(SHAPE[1], 0), 0.4).spectrum(), granularity == "column")
    return Quantities(granularity_from(granularity), SHAPE, source, seeded(seed), task, reference, means, **more)


@pytest.mark.parametrize(("name", "granularity"), [case for case in CASES if case[0] != "random"])
def test_every_criterion_computes_its_formula(name, granularity, matrices):
    result = CRITERIA[name].score(quantities(granularity, matrices))
    assert result.dtype == torch.float32 and result.shape == (units(granularity, SHAPE),)
    torch.testing.assert_close(result.double(), criterion_scores(name, granularity, matrices), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "granularity"), CASES)
def test_scores_of_zero_statistics_are_finite_and_not_negative(name, granularity, matrices):
    zeros = {key: torch.zeros_like(value) for key, value in matrices.items()}
    result = CRITERIA[name].score(quantities(granularity, zeros))
    assert torch.isfinite(result).all() and (result >= 0).all()


@pytest.mark.parametrize("name", ["gain_per_harm", "fisher_ratio", "input_ratio"])
def test_with_a_zero_reference_only_the_task_ranks_the_units(name, matrices):
    granularity = granularity_of(name)
    zero = matrices | {key: torch.zeros_like(matrices[key]) for key in ("reference", "reference input")}
    result = CRITERIA[name].score(quantities(granularity, zero))
    alone = matrices["input"] if name == "input_ratio" else unit_scores(granularity, matrices["fisher"])
    assert torch.equal(result.argsort(), alone.argsort())


def test_ssu_selects_the_columns_that_the_reference_uses_least(matrices):
    scores = {name: CRITERIA[name].score(quantities("column", matrices)) for name in ("ssu", "ssu_inputs")}
    wanda = (matrices["weight"].abs() * matrices["reference input"].sqrt()).sum(0)
    assert torch.equal(scores["ssu"].argsort(), wanda.argsort(descending=True))
    assert torch.equal(scores["ssu_inputs"].argsort(), matrices["reference input"].argsort(descending=True))


def test_gain_per_harm_is_proportional_to_its_formula_within_a_weight(granularity, matrices):
    """Scores equal ``sqrt(F_new) / (F_ref + 1 %)`` of each unit, times a constant."""
    result = CRITERIA["gain_per_harm"].score(quantities(granularity, matrices)).double()
    new, kept = (unit_scores(granularity, matrices[name]) for name in ("fisher", "reference"))
    ratio = result / (new.sqrt() / (kept + 0.01 * kept.mean()))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["random", "weight_magnitude"])
def test_a_data_free_criterion_depends_only_on_the_seed_and_does_not_use_the_global_rng(name, granularity, matrices):
    state = torch.get_rng_state()
    first, second = (CRITERIA[name].score(quantities(granularity, matrices, seed=3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not CRITERIA[name].needs_data


def test_random_scores_differ_by_seed_and_are_never_zero(granularity):
    scores = [CRITERIA["random"].score(quantities(granularity, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(*scores)
    assert all((s > 0).all() and (s <= 1).all() for s in scores)


def test_a_unit_with_a_random_draw_of_zero_can_still_be_selected(granularity, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.zeros(count))
    assert (CRITERIA["random"].score(quantities(granularity)) > 0).all()


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        (name, granularity)
        for name in CRITERIA
        for granularity in KINDS
        if not CRITERIA[name].supports(granularity_from(granularity))
    ],
)
def test_the_config_rejects_granularities_that_a_criterion_does_not_support(name, granularity):
    with pytest.raises(ValueError, match=f"criterion '{name}' requires granularity=.*got granularity='{granularity}'"):
        FGGMConfig(criterion=name, granularity=granularity)


def test_an_unknown_criterion_or_statistic_suggests_the_closest_name():
    with pytest.raises(ValueError, match=r"unknown criterion 'fischer'.*Did you mean 'fisher'"):
        CRITERIA["fischer"]
    with pytest.raises(ValueError, match=r"unknown statistic 'fischer'.*Did you mean 'fisher'"):
        Criterion(lambda q: q.task["fischer"], task=("fischer",))


# In a model --------------------------------------------------------------------------------------


def supports(criterion, granularity, batches, reference=None, threshold=None, score_memory=None, **arguments):
    decay = {"harm_decay": 1.0} if CRITERIA[criterion].uses_covariance else {}
    model = adapted(llama(), granularity, criterion=criterion, threshold=threshold, score_memory=score_memory, **decay)
    report = select_parameters(model, batches, reference=reference, progress=False, **arguments)
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}, report


def assert_same(first, second):
    for name, indices in first.items():
        assert torch.equal(indices, second[name]), name


REFERENCE = token_batches(sizes=(4, 3), seed=5)
DATA_CASES = [case for case in CASES if CRITERIA[case[0]].needs_data]


def reference_of(name):
    return REFERENCE if CRITERIA[name].reference or CRITERIA[name].uses_covariance else None


@pytest.mark.parametrize(("name", "granularity"), DATA_CASES)
def test_the_batch_size_does_not_change_the_support(name, granularity):
    whole = token_batches(sizes=(8,))[0]
    result = []
    for size in (1, 4):
        batches = [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 8, size)]
        result.append(supports(name, granularity, batches, reference_of(name), num_samples=6)[0])
    assert_same(*result)


@pytest.mark.parametrize(("name", "granularity"), DATA_CASES)
def test_every_data_criterion_reports_the_regret_of_one_half_of_the_samples(name, granularity):
    whole = token_batches(sizes=(2,))[0]
    twice = {key: value.repeat_interleave(2, 0) for key, value in whole.items()}
    _, report = supports(name, granularity, [twice, twice], reference_of(name) and [twice, twice])
    assert report.samples == 8 and report.regret == pytest.approx(0, abs=1e-6)  # both halves have the same samples
    _, report = supports(name, granularity, token_batches(), reference_of(name))
    assert report.regret > 1e-4 or "ssu" in name  # the task has no influence on it


@pytest.mark.parametrize(("name", "granularity"), DATA_CASES)
def test_limited_score_memory_does_not_change_the_support(name, granularity):
    threshold = ScoreMass(0.6)
    one, _ = supports(name, granularity, token_batches(), reference_of(name), threshold)
    bytes_of_the_largest = 2 * 4 * 96 * 64 * (2 if CRITERIA[name].reference else 1)
    if granularity != "element":
        bytes_of_the_largest = 2 * 4 * 97 * (2 if CRITERIA[name].reference else 1)
    several, _ = supports(
        name, granularity, token_batches(), reference_of(name), threshold, score_memory=bytes_of_the_largest
    )
    assert_same(one, several)


@pytest.mark.parametrize("name", [n for n in CRITERIA if n in ("input_ratio", "ssu")])
def test_a_criterion_of_inputs_runs_no_backward_pass(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    grad_enabled = []
    model = adapted(llama(), granularity_of(name), criterion=name)
    model.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    model.get_base_model().register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    select_parameters(model, token_batches(), reference=reference_of(name), progress=False)
    assert grad_enabled and not any(grad_enabled)


@pytest.mark.parametrize("threshold", [TopDensity(0.2), TopDensity(0.2, scope="global")])
def test_a_custom_criterion_needs_one_function_and_one_registration(granularity, threshold):
    """It is registered outside the package and declares the statistics that it uses."""
    name = "mine"
    mine = {"task": ("fisher",), "reference": ("fisher",)}
    CRITERIA.register(name, **mine)(lambda q: q.task["fisher"] * q.reference["fisher"])
    try:
        result, report = supports(name, granularity, token_batches(), REFERENCE, threshold)
        assert report.reference_samples == 7 and report.density == pytest.approx(0.2, abs=0.02)
        assert sum(map(len, result.values()))
        assert FGGMConfig.from_peft_type(**FGGMConfig(criterion=name).to_dict()).criterion == name
    finally:
        del CRITERIA._entries[name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_invalid_scores_raise_an_error_that_names_the_module(value):
    CRITERIA.register("broken", task=("fisher",))(lambda q: q.task["fisher"] * 0 + value)
    try:
        with pytest.raises(ValueError, match=r"module model\.layers\.0"):
            supports("broken", "row", token_batches())
    finally:
        del CRITERIA._entries["broken"]


def test_a_module_with_all_zero_scores_causes_a_warning_with_the_remedy():
    silent = lambda q: q.task["fisher"] * (0 if q.shape == (96, 64) else 1)  # noqa: E731  # gate and up
    CRITERIA.register("silent", task=("fisher",))(silent)
    try:
        with pytest.warns(UserWarning, match=r"4 of 14 modules \(model\.layers\.0\.mlp\.gate_proj.*is 0.*'global'"):
            supports("silent", "row", token_batches())
    finally:
        del CRITERIA._entries["silent"]
