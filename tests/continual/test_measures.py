"""Every measure against matrices computed by hand, and what is said over several runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fggm_peft.continual.measures import MEASURES, measures_of, pareto_front, summary_of

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
    "general": 2.9 - 2.0,
    "general_worst": 3.5 - 2.0,
    "other": 2.6 - 2.5,
    "kl": (0.3 + 0.1 + 0.8) / 3,
}
matrices = st.integers(1, 5).flatmap(
    lambda tasks: st.lists(
        st.lists(st.floats(0, 1), min_size=tasks, max_size=tasks), min_size=tasks, max_size=tasks
    ).map(np.array)
)


TEXTS = ([2.0, 3.5, 3.0, 2.9], [2.5, 2.4, 2.7, 2.6], [0.3, 0.1, 0.8])  # two losses, KL


def value(name: str, scores, zero_shot=None, *losses) -> float | None:
    zero_shot = [NAN] * len(scores) if zero_shot is None else zero_shot
    return measures_of(scores, zero_shot, *losses)[name]


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_agrees_with_its_formula_by_hand(name):
    assert value(name, SCORES, ZERO_SHOT, *TEXTS) == pytest.approx(BY_HAND[name])


def test_the_report_shows_the_formula_of_the_docstring():
    assert MEASURES["op"].formula == "OP_T = mean_j R[T,j]"


def test_all_measures_differ_in_the_example():
    assert len({round(value(name, SCORES, ZERO_SHOT, *TEXTS), 12) for name in MEASURES}) == len(list(MEASURES))


def test_a_method_that_learns_all_tasks_at_once_has_only_measures_of_its_end():
    known = {"op": 0.5, "general": 0.9, "general_worst": 1.5, "other": 0.1, "kl": 0.4}
    computed = measures_of(SCORES[-1:], ZERO_SHOT, *TEXTS)
    assert computed == dict.fromkeys(MEASURES) | {name: pytest.approx(value) for name, value in known.items()}


def test_tasks_of_the_future_need_no_scores():
    known = np.where(np.tri(3, dtype=bool), SCORES, NAN)
    complete, partial = (measures_of(scores, ZERO_SHOT) for scores in (SCORES, known))
    assert partial == complete | {"fwt": None}


def test_forward_transfer_needs_only_the_score_directly_before_a_task():
    scores = np.array(SCORES)
    scores[0, 2] = NAN
    assert value("fwt", scores, [NAN, 0.1, 0.3]) == pytest.approx(BY_HAND["fwt"])
    assert value("fwt", SCORES) is None
    assert value("fwt", SCORES, [0.2, NAN, 0.3]) is None


def test_a_single_task_transfers_nothing_and_forgets_nothing():
    expected = dict.fromkeys(MEASURES) | dict.fromkeys(("op", "op_mean", "diagonal"), 0.6)
    assert measures_of([[0.6]], [0.1]) == expected


def test_the_first_of_two_tasks_is_forgotten_from_its_only_earlier_score():
    scores = [[0.8, None], [0.5, 0.9]]
    assert value("forgetting", scores) == pytest.approx(0.3) == -value("bwt", scores)


def test_forgetting_is_negative_if_the_last_task_helped_the_first():
    assert value("forgetting", [[0.5, NAN], [0.8, 0.9]]) == pytest.approx(-0.3)


@given(matrices)
def test_forgetting_is_never_less_than_what_backward_transfer_lost(scores):
    if len(scores) > 1:
        assert value("forgetting", scores) >= -value("bwt", scores) - 1e-12


@given(matrices)
def test_means_over_tasks_and_steps(scores):
    assert value("op", scores) == pytest.approx(scores[-1].mean())
    steps = [np.mean([scores[t, j] for j in range(t + 1)]) for t in range(len(scores))]
    assert value("op_mean", scores) == pytest.approx(np.mean(steps))
    assert value("diagonal", scores) == pytest.approx(scores.trace() / len(scores))


# --- over seeds and orders -----------------------------------------------------------------------


def test_a_summary_by_hand():
    # t of 2 degrees of freedom at 97.5 %: 4.302653; std of 1, 2, 3: 1
    half = 4.302653 / 3**0.5
    interval = pytest.approx([2 - half, 2 + half], rel=1e-6)
    assert summary_of([1.0, None, 2.0, NAN, 3.0]) == {"mean": 2.0, "std": 1.0, "n": 3, "interval": interval}


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8, unique=True))
def test_the_interval_is_that_of_a_t_test(values):
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert summary_of(values)["interval"] == pytest.approx(list(expected), rel=1e-6, abs=1e-9)


def test_one_run_has_no_interval_and_no_deviation():
    assert summary_of([0.7]) == {"mean": 0.7, "std": None, "n": 1, "interval": None}
    assert summary_of([]) is summary_of([None, NAN]) is None


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
