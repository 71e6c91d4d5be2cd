"""Every measure against matrices computed by hand, and what is said over several runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fggm_peft.continual import measures
from fggm_peft.continual.measures import (
    MEASURES,
    bwt,
    diagonal,
    forgetting,
    fwt,
    measures_of,
    op,
    op_mean,
    op_per_step,
    paired_difference,
    pareto_front,
    summarise,
)

NAN = float("nan")
# after task 1, 2, 3; task 1 gets better with task 2 before it is forgotten
SCORES = [
    [0.80, 0.30, 0.10],
    [0.90, 0.70, 0.20],
    [0.50, 0.60, 0.40],
]
ZERO_SHOT = [0.2, 0.1, 0.3]
BY_HAND = {
    "op": (0.50 + 0.60 + 0.40) / 3,
    "op_mean": (0.80 + 0.80 + 0.50) / 3,
    "diagonal": (0.80 + 0.70 + 0.40) / 3,
    "bwt": ((0.50 - 0.80) + (0.60 - 0.70)) / 2,
    "forgetting": ((0.90 - 0.50) + (0.70 - 0.60)) / 2,
    "fwt": ((0.30 - 0.1) + (0.20 - 0.3)) / 2,
}
matrices = st.integers(1, 5).flatmap(
    lambda tasks: st.lists(
        st.lists(st.floats(0, 1), min_size=tasks, max_size=tasks), min_size=tasks, max_size=tasks
    ).map(np.array)
)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_agrees_with_its_formula_by_hand(name):
    assert MEASURES[name].compute(SCORES, ZERO_SHOT) == pytest.approx(BY_HAND[name])
    assert measures_of(SCORES, ZERO_SHOT)[name] == pytest.approx(BY_HAND[name])


@pytest.mark.parametrize("name", MEASURES)
def test_the_report_shows_the_formula_of_the_docstring(name):
    assert f"``{MEASURES[name].formula}``" in getattr(measures, name).__doc__


def test_all_measures_differ_in_the_example():
    values = measures_of(SCORES, ZERO_SHOT).values()
    assert len({round(value, 12) for value in values}) == len(MEASURES)


def test_the_performance_of_every_step_by_hand():
    assert op_per_step(SCORES) == pytest.approx([0.8, 0.8, 0.5])


def test_tasks_of_the_future_need_no_scores():
    known = np.where(np.tri(3, dtype=bool), SCORES, NAN)
    complete, partial = measures_of(SCORES, ZERO_SHOT), measures_of(known, ZERO_SHOT)
    assert partial["fwt"] is None
    for name in set(MEASURES) - {"fwt"}:
        assert partial[name] == complete[name]


def test_forward_transfer_needs_only_the_score_directly_before_a_task():
    scores = np.array(SCORES)
    scores[0, 2] = NAN
    assert fwt(scores, [NAN, 0.1, 0.3]) == pytest.approx(BY_HAND["fwt"])
    assert fwt(SCORES) is None
    assert fwt(SCORES, [0.2, NAN, 0.3]) is None


def test_a_single_task_transfers_nothing_and_forgets_nothing():
    assert measures_of([[0.6]], [0.1]) == dict.fromkeys(MEASURES) | dict.fromkeys(("op", "op_mean", "diagonal"), 0.6)


def test_the_first_of_two_tasks_is_forgotten_from_its_only_earlier_score():
    scores = [[0.8, NAN], [0.5, 0.9]]
    assert forgetting(scores) == pytest.approx(0.3) == -bwt(scores)


def test_forgetting_is_negative_if_the_last_task_helped_the_first():
    assert forgetting([[0.5, NAN], [0.8, 0.9]]) == pytest.approx(-0.3)


@given(matrices)
def test_forgetting_is_never_less_than_what_backward_transfer_lost(scores):
    if len(scores) > 1:
        assert forgetting(scores) >= -bwt(scores) - 1e-12


@given(matrices)
def test_the_last_step_of_op_is_the_final_one_and_their_mean_is_the_mean(scores):
    assert op_per_step(scores)[-1] == op(scores) == pytest.approx(scores[-1].mean())
    assert op_mean(scores) == pytest.approx(sum(op_per_step(scores)) / len(scores))
    assert op_per_step(scores)[0] == scores[0, 0]
    assert diagonal(scores) == pytest.approx(scores.trace() / len(scores))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[0.1, 0.2]], r"must be a square .*\[1, 2\]"),
        ([], "must be a square"),
        ([[0.1, NAN], [NAN, 0.2]], "the score on task 1 after task 2 is nan"),
        ([[NAN, 0.1], [0.3, 0.2]], "the score on task 1 after task 1 is nan"),
        ([[0.1, float("inf")], [0.3, 0.2]], "the score on task 2 after task 1 is inf"),
    ],
)
def test_missing_scores_raise_an_error_that_names_them(scores, message):
    with pytest.raises(ValueError, match=message):
        op(scores)


def test_there_must_be_a_zero_shot_score_for_each_task():
    with pytest.raises(ValueError, match="one number for each of 3 tasks"):
        fwt(SCORES, [0.1, 0.2])


# --- over seeds and orders -----------------------------------------------------------------------


def test_a_summary_by_hand():
    # t of 2 degrees of freedom at 97.5 %: 4.302653; std of 1, 2, 3: 1
    summary = summarise([1.0, 2.0, 3.0])
    assert (summary.mean, summary.std, summary.n) == (2.0, 1.0, 3)
    half = 4.302653 / 3**0.5
    assert summary.interval == pytest.approx([2 - half, 2 + half], rel=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8, unique=True), st.sampled_from([0.5, 0.9, 0.99]))
def test_the_interval_is_that_of_a_t_test(values, confidence):
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    assert summarise(values, confidence).interval == pytest.approx(list(expected), rel=1e-6, abs=1e-9)


def test_one_run_has_no_interval_and_no_deviation():
    summary = summarise([0.7])
    assert (summary.mean, summary.std, summary.n, summary.interval) == (0.7, None, 1, None)
    assert summary.to_dict()["interval"] is None


@pytest.mark.parametrize("values", [[], [0.1, NAN], [float("inf")]])
def test_a_summary_of_no_or_non_finite_values_is_rejected(values):
    with pytest.raises(ValueError, match="at least one value and only finite ones"):
        summarise(values)


def test_a_confidence_in_percent_is_rejected():
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        summarise([1.0, 2.0], confidence=95)


def test_runs_are_paired_by_seed_and_task_order():
    a = {(0, "given"): 0.5, (1, "given"): 0.9, (0, "reversed"): 0.1}
    b = {(0, "reversed"): 0.0, (1, "given"): 0.7, (0, "given"): 0.4}
    result = paired_difference(a, b)
    assert result.mean == pytest.approx((0.1 + 0.2 + 0.1) / 3)
    assert result.n == 3 and result.unpaired == ()
    expected = stats.ttest_rel([0.5, 0.9, 0.1], [0.4, 0.7, 0.0]).confidence_interval(0.95)
    assert result.interval == pytest.approx(list(expected))


def test_pairing_shows_a_difference_hidden_by_the_variance_between_runs():
    a = {seed: value + 0.01 + 0.0001 * seed for seed, value in enumerate([0.1, 0.5, 0.9])}
    b = dict(enumerate([0.1, 0.5, 0.9]))
    assert paired_difference(a, b).is_clear
    overlap = summarise(list(a.values())).interval, summarise(list(b.values())).interval
    assert overlap[0][0] < overlap[1][1]
    assert not paired_difference({0: 1.0, 1: 0.0}, {0: 0.0, 1: 1.0}).is_clear


def test_runs_of_only_one_method_are_reported_and_ignored():
    result = paired_difference({(0, "given"): 0.5, (1, "given"): 99.0}, {(0, "given"): 0.3, (2, "given"): -99.0})
    assert result.mean == pytest.approx(0.2)
    assert result.unpaired == ((1, "given"), (2, "given"))
    assert result.n == 1 and result.interval is None and not result.is_clear
    assert json.loads(json.dumps(result.to_dict()))["unpaired"] == [[1, "given"], [2, "given"]]


def test_methods_without_a_common_run_cannot_be_compared():
    with pytest.raises(ValueError, match="no run to pair"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_the_pareto_front_by_hand():
    # learned, forgotten: the second is beaten by the first, the last one by the third
    points = [(0.8, 0.2), (0.7, 0.3), (0.9, 0.5), (0.1, 0.0), (0.9, 0.6)]
    assert pareto_front(points) == [0, 2, 3]


def test_equal_points_are_both_on_the_front():
    assert pareto_front([(0.5, 0.1), (0.5, 0.1), (0.5, 0.2)]) == [0, 1]
    assert pareto_front([]) == []


coordinates = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@given(st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=8))
def test_every_point_off_the_front_is_dominated_by_a_point_on_it(points):
    front = pareto_front(points)
    assert front
    for i, (learned, forgotten) in enumerate(points):
        better = [points[j] for j in front if points[j][0] >= learned and points[j][1] <= forgotten]
        if i in front:
            assert set(better) == {points[i]}
        else:
            assert better and points[i] not in better


def test_a_nan_point_is_rejected():
    with pytest.raises(ValueError, match="not a number"):
        pareto_front([(0.1, 0.2), (NAN, 0.1)])
