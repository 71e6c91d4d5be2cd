"""Every threshold policy against sorting."""

from __future__ import annotations

import json
import re

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fggm_peft.core.errors import NonFiniteScoreError
from fggm_peft.core.ranking import top_indices
from fggm_peft.core.threshold import (
    POLICIES,
    MeanPlusStd,
    ParameterBudget,
    ScoreMass,
    TopDensity,
    policy_from_dict,
)

quick = settings(max_examples=40, deadline=None)
densities = st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0])
# a strategy for the fields of each policy; policies without one use their defaults
FIELDS = {
    "top_density": {"density": densities},
    "score_mass": {"fraction": densities},
    "mean_plus_std": {"k": st.sampled_from([-10.0, -1.0, 0.0, 0.5, 1.0, 2.0])},
    "parameter_budget": {"count": st.integers(4, 40)},
}
# few distinct values give many ties; multiples of 0.25 are exact in every dtype, also divided by a cost of 2 or 4
numbers = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 3.0]) | st.integers(0, 200).map(float)


@st.composite
def scored_weights(draw, most=4, costs=(1, 2, 4)):
    """Scores of several weights, and the cost of a unit of each weight."""
    scores = draw(st.lists(st.lists(numbers, min_size=1, max_size=12), min_size=1, max_size=most))
    return scores, [draw(st.sampled_from(costs)) for _ in scores]


def choose(policy, scores, costs, dtype=torch.float32, **bounds):
    chosen = policy.choose([torch.tensor(s, dtype=dtype) for s in scores], costs, **bounds)
    assert all(c.dtype == torch.int64 and c.device.type == "cpu" for c in chosen)
    return [c.tolist() for c in chosen]


@st.composite
def policies(draw, name):
    fields = {field: draw(values) for field, values in FIELDS.get(name, {}).items()}
    return POLICIES[name](**fields, scope=draw(st.sampled_from(POLICIES[name].scopes)))


def fits(policy, scores, costs, most=None):
    """Whether the policy accepts these weights: a budget must cover one unit, and fit the weights."""
    if policy.name != "parameter_budget":
        return True
    limits = [min(len(s), most or len(s)) for s in scores]
    return min(costs) <= policy.count <= spent(limits, costs)


def spent(units: list[int], costs: list[int]) -> int:
    return sum(n * cost for n, cost in zip(units, costs, strict=True))


each_policy = pytest.mark.parametrize("name", list(POLICIES))


# All policies ------------------------------------------------------------------------------------


@quick
@given(data=st.data(), weights=scored_weights())
@each_policy
def test_selected_units_are_sorted_unique_positive_and_not_below_the_rest(name, data, weights):
    scores, costs = weights
    policy = data.draw(policies(name))
    if not fits(policy, scores, costs):
        return
    for vector, chosen in zip(scores, choose(policy, scores, costs), strict=True):
        assert chosen == sorted(set(chosen))
        assert all(vector[i] > 0 for i in chosen)
        assert chosen == reference.top_k(vector, len(chosen))


@quick
@given(data=st.data(), weights=scored_weights())
@each_policy
def test_the_dtype_of_the_scores_does_not_change_the_selection(name, data, weights):
    scores, costs = weights
    policy = data.draw(policies(name))
    if fits(policy, scores, costs):
        narrow, usual, wide = (
            choose(policy, scores, costs, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)
        )
        assert narrow == usual == wide


@quick
@given(data=st.data())
@each_policy
def test_without_ties_the_order_of_the_weights_does_not_matter(name, data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    values = data.draw(st.permutations(range(1, sum(sizes) + 1)))
    costs = [4] * len(sizes)
    scores = [[float(v) for v in values[sum(sizes[:w]) : sum(sizes[: w + 1])]] for w in range(len(sizes))]
    order = data.draw(st.permutations(range(len(sizes))))
    policy = data.draw(policies(name))
    if fits(policy, scores, costs):
        straight = choose(policy, scores, costs)
        assert choose(policy, [scores[w] for w in order], costs) == [straight[w] for w in order]


@quick
@given(data=st.data(), weights=scored_weights())
@pytest.mark.parametrize("name", [name for name in POLICIES if "layer" in POLICIES[name].scopes])
def test_layer_scope_selects_in_each_weight_separately_and_ignores_the_cost(name, data, weights):
    scores, costs = weights
    fields = {field: data.draw(values) for field, values in FIELDS.get(name, {}).items()}
    policy = POLICIES[name](**fields, scope="layer")
    alone = [choose(policy, [vector], [1])[0] for vector in scores]
    assert choose(policy, scores, costs) == alone


@quick
@given(data=st.data())
@each_policy
def test_a_policy_survives_json(name, data):
    policy = data.draw(policies(name))
    text = json.dumps(policy.to_dict())
    assert json.loads(text)["policy"] == name
    assert policy_from_dict(json.loads(text)) == policy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@each_policy
def test_scores_must_be_finite_and_not_negative(name, bad):
    policy = POLICIES[name]() if name != "parameter_budget" else ParameterBudget(count=1)
    with pytest.raises(NonFiniteScoreError, match="finite and not negative"):
        policy.choose([torch.tensor([1.0, bad])], [1])


@each_policy
def test_weights_with_all_zero_scores_are_not_selected(name):
    policy = POLICIES[name]() if name != "parameter_budget" else ParameterBudget(count=2)
    for zero in (0.0, -0.0):
        assert choose(policy, [[zero, zero, zero], [zero]], [1, 1]) == [[], []]


# Single policies ---------------------------------------------------------------------------------


@quick
@given(scores=st.lists(numbers, min_size=1, max_size=30), k=st.integers(0, 35))
def test_top_indices_agree_with_sorting_and_ties_prefer_the_lower_index(scores, k):
    assert top_indices(torch.tensor(scores), k).tolist() == reference.top_k(scores, k)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_top_indices_order_arbitrary_floats_by_every_bit(data):
    floats = st.floats(0, 2.0**127, width=32)
    scores = data.draw(st.lists(floats, min_size=1, max_size=40))
    scores += [float(torch.nextafter(torch.tensor(s), torch.tensor(4e38))) for s in scores if s < 1e38]
    k = data.draw(st.integers(1, len(scores)))
    assert top_indices(torch.tensor(scores), k).tolist() == reference.top_k(scores, k)


@pytest.mark.parametrize("count", [1, 1 << 20, (1 << 20) + 1, 1_500_000])
def test_top_indices_of_a_large_weight_are_exact(count):
    scores = torch.rand(1_500_000, generator=reference.seeded())
    chosen = top_indices(scores, count)
    expected = scores.sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(chosen, expected[scores[expected] > 0])


@quick
@given(weights=scored_weights(), density=densities)
def test_top_density_selects_its_share_of_each_weight(weights, density):
    scores, costs = weights
    expected = [reference.top_k(s, max(1, round(density * len(s)))) for s in scores]
    assert choose(TopDensity(density), scores, costs) == expected


@quick
@given(weights=scored_weights(), density=densities)
def test_global_top_density_selects_its_share_of_all_parameters(weights, density):
    scores, costs = weights
    total = sum(len(s) * c for s, c in zip(scores, costs, strict=True))
    expected = reference.within_budget(scores, costs, round(density * total))
    assert choose(TopDensity(density, scope="global"), scores, costs) == expected


@quick
@given(weights=scored_weights(), fraction=densities)
def test_score_mass_selects_the_smallest_set_with_the_fraction(weights, fraction):
    scores, costs = weights
    expected = [reference.holding([s], [1], fraction)[0] for s in scores]
    assert choose(ScoreMass(fraction), scores, costs) == expected
    assert choose(ScoreMass(fraction, scope="global"), scores, costs) == reference.holding(scores, costs, fraction)


@quick
@given(weights=scored_weights(costs=(3, 41, 4097)), fraction=densities)
def test_score_mass_is_correct_when_dividing_by_the_cost_rounds(weights, fraction):
    scores, costs = weights
    expected = [reference.holding([s], [1], fraction)[0] for s in scores]
    assert choose(ScoreMass(fraction), scores, costs) == expected
    for s, cost in zip(scores, costs, strict=True):
        # the global scope ranks by score / cost in float32, so the fraction has float32 precision
        near = [reference.holding([s], [cost], fraction * f) for f in (1 - 2.0**-22, 1, 1 + 2.0**-22)]
        assert choose(ScoreMass(fraction, scope="global"), [s], [cost]) in near


@pytest.mark.parametrize("cost", [1, 3, 41, 4097])
def test_score_mass_selects_no_extra_unit_when_the_fraction_is_met_exactly(cost):
    for a in range(1, 10):
        for b in range(1, 10):
            assert choose(ScoreMass(0.5), [[a + b, a, b]], [cost]) == [[0]]
    assert choose(ScoreMass(0.5), [[1.0] * 10], [cost]) == [[0, 1, 2, 3, 4]]
    assert choose(ScoreMass(0.5, scope="global"), [[1.0] * 10], [cost]) == [[0, 1, 2, 3, 4]]


@quick
@given(weights=scored_weights(), k=FIELDS["mean_plus_std"]["k"])
def test_mean_plus_std_selects_the_scores_above_its_threshold(weights, k):
    scores, costs = weights
    for scope, groups in (("layer", [([s], [1]) for s in scores]), ("global", [(scores, costs)])):
        low, expected, high = (
            [chosen for group in groups for chosen in reference.above_mean(*group, k + shift)]
            for shift in (-1e-9, 0, 1e-9)
        )
        assume(low == high)  # rounding decides about a score on the threshold itself
        assert choose(MeanPlusStd(k, scope=scope), scores, costs) == expected


def test_mean_plus_std_selects_equal_scores_only_with_a_threshold_below_them():
    for value in (0.1, 1.0, 3.7):
        assert choose(MeanPlusStd(0.0), [[value] * 7], [1]) == [[]]
    assert choose(MeanPlusStd(-0.5), [[1.0, 2.0, 3.0]], [1]) == [[1, 2]]


@quick
@given(weights=scored_weights(costs=(1, 2, 3, 7)), share=st.floats(0, 1))
def test_a_parameter_budget_is_never_exceeded_and_uses_every_unit_that_fits_at_the_cutoff(weights, share):
    scores, costs = weights
    total = sum(len(s) * c for s, c in zip(scores, costs, strict=True))
    count = min(costs) + int(share * (total - min(costs)))
    chosen = choose(ParameterBudget(count), scores, costs)
    assert chosen == reference.within_budget(scores, costs, count)
    used = spent(map(len, chosen), costs)
    assert used <= count
    taken = {(w, i) for w, indices in enumerate(chosen) for i in indices}
    left_out = [(rank, w) for rank, w, i in reference.ranked(scores, costs) if (w, i) not in taken]
    if left_out:
        best = left_out[0][0]
        assert all(costs[w] > count - used for rank, w in left_out if rank == best)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_equal_scores_are_selected_from_the_lowest_index(scope):
    scores = [[1.0, 1.0, 0.0, 1.0], [1.0, 1.0]]
    chosen = choose(TopDensity(0.5, scope=scope), scores, [1, 1])
    assert chosen == ([[0, 1], [0]] if scope == "layer" else [[0, 1, 3], []])


# Bounds ------------------------------------------------------------------------------------------

bounds = st.none() | st.integers(1, 6)


@st.composite
def bounded_budgets(draw):
    """Weights, a bound on units, and a budget that fits them."""
    scores, costs = draw(scored_weights(costs=(1, 2, 3, 7)))
    most = draw(bounds)
    limits = [min(len(s), most or len(s)) for s in scores]
    return scores, costs, most, ParameterBudget(draw(st.integers(min(costs), spent(limits, costs))))


@quick
@given(weights=bounded_budgets())
def test_a_budget_is_never_exceeded(weights):
    scores, costs, most, policy = weights
    chosen = choose(policy, scores, costs, most=most)
    assert chosen == reference.within_bounds(scores, costs, policy.count, most)
    used = spent(map(len, chosen), costs)
    assert used <= policy.count
    assert most is None or all(len(indices) <= most for indices in chosen)
    if all(s > 0 for vector in scores for s in vector):
        assert policy.count - used < max(costs)


@quick
@given(weights=bounded_budgets(), data=st.data())
def test_with_equal_costs_a_larger_budget_extends_the_selection_of_a_smaller_one(weights, data):
    scores, costs, most, policy = weights
    limits = [min(len(s), most or len(s)) for s in scores]
    if data.draw(st.booleans()):
        costs = [1] * len(costs)
        policy = ParameterBudget(data.draw(st.integers(1, sum(limits))))
    larger = data.draw(st.integers(policy.count, spent(limits, costs)))
    small = choose(policy, scores, costs, most=most)
    large = choose(ParameterBudget(larger), scores, costs, most=most)
    assert spent(map(len, small), costs) <= spent(map(len, large), costs)
    if len(set(costs)) == 1:
        assert all(set(a) <= set(b) for a, b in zip(small, large, strict=True))


@quick
@given(data=st.data(), weights=scored_weights(), most=st.integers(1, 6))
@each_policy
def test_a_bound_on_units_selects_the_best_of_each_weight(name, data, weights, most):
    scores, costs = weights
    policy = data.draw(policies(name))
    if not fits(policy, scores, costs, most):
        return
    chosen = choose(policy, scores, costs, most=most)
    assert all(indices == reference.top_k(s, len(indices)) for s, indices in zip(scores, chosen, strict=True))
    assert all(len(indices) <= most for indices in chosen)
    if policy.scope == "layer":
        free = choose(policy, scores, costs)
        assert [len(indices) for indices in chosen] == [min(most, len(indices)) for indices in free]


def test_the_budget_beyond_a_bound_goes_to_the_other_weights():
    scores = [[9.0, 8.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0]]
    for policy in (ParameterBudget(4), TopDensity(0.5, scope="global")):
        assert choose(policy, scores, [1, 1]) == [[0, 1, 2, 3], []]
        assert choose(policy, scores, [1, 1], most=3) == [[0, 1, 2], [0]]


@quick
@given(data=st.data(), most=bounds, sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4))
@each_policy
def test_a_forecast_is_correct_for_all_scores(name, data, most, sizes):
    positive = st.floats(0.25, 100, width=16)
    scores = [data.draw(st.lists(positive, min_size=size, max_size=size)) for size in sizes]
    costs = [data.draw(st.sampled_from([1, 2, 3, 7])) for _ in sizes]
    policy = data.draw(policies(name))
    if not fits(policy, scores, costs, most):
        return
    forecast = policy.forecast(sizes, costs, most=most)
    chosen = choose(policy, scores, costs, most=most)
    assert forecast.least <= spent(map(len, chosen), costs) <= forecast.most
    assert spent(forecast.units, costs) <= forecast.most
    if name == "top_density" and policy.scope == "layer":
        assert forecast.units == [len(indices) for indices in chosen]


# Errors ------------------------------------------------------------------------------------------

BAD = [
    (TopDensity, "density", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.3", None], r"in \(0, 1\]"),
    (MeanPlusStd, "k", [float("nan"), float("inf"), -float("inf"), True, "1", None], "a finite number"),
    (ScoreMass, "fraction", [0, -0.1, 1.01, float("nan"), True, "0.9", None], r"in \(0, 1\]"),
    (ParameterBudget, "count", [0, -1, 2.5, float("nan"), True, "10", None], "an integer > 0"),
]


@pytest.mark.parametrize(("policy", "field", "value", "legal"), [(p, f, v, r) for p, f, vs, r in BAD for v in vs])
def test_an_invalid_value_raises_an_error_with_the_value_and_the_valid_range(policy, field, value, legal):
    with pytest.raises(ValueError, match=rf"{policy.__name__}\.{field} must be {legal}, got {re.escape(repr(value))}"):
        policy(**{field: value})
    with pytest.raises(ValueError, match=rf"must be {legal}, got {re.escape(repr(value))}"):
        policy_from_dict({"policy": policy.name, field: value})


@each_policy
def test_a_policy_rejects_an_unsupported_scope(name):
    other = next(s for s in ("model", "layer", "global") if s not in POLICIES[name].scopes)
    legal = " or ".join(map(repr, POLICIES[name].scopes))
    with pytest.raises(ValueError, match=f"scope must be {legal}, got {other!r}"):
        POLICIES[name](scope=other)


def test_a_budget_above_the_targeted_weights_or_below_one_unit_is_rejected():
    scores, costs = [torch.ones(3), torch.ones(2)], [4, 6]
    for count in (3, 25):
        with pytest.raises(ValueError, match=rf"budget of {count} values.* at least 4 \(one unit\).* at most 24"):
            ParameterBudget(count).choose(scores, costs)
    with pytest.raises(ValueError, match=r"budget of 11 values.* at most 10 \(.*at most 1 units each\)"):
        ParameterBudget(11).choose(scores, costs, most=1)


def test_an_unknown_policy_suggests_the_closest_and_an_unknown_argument_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown threshold policy 'top_densty'.*Did you mean 'top_density'"):
        policy_from_dict({"policy": "top_densty", "density": 0.3})
    with pytest.raises(ValueError, match=r"unknown threshold policy None; known are 'top_density'"):
        policy_from_dict({"density": 0.3})
    with pytest.raises(ValueError, match="TopDensity has no argument 'fraction'; it takes density, scope"):
        policy_from_dict({"policy": "top_density", "fraction": 0.3})
