"""Metrics of tasks against values by hand, published examples and plain reference implementations."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fggm_peft.continual.metrics import (
    METRICS,
    accuracy,
    edit_similarity,
    exact_match,
    rouge_l,
    sample_scores,
    task_score,
)

texts = st.text("ab cd.\n,1é中", max_size=14)


def test_accuracy_compares_the_first_line():
    assert accuracy(" A\nBecause it is so.", "A\nBecause of something else.") == 1
    assert accuracy("card  declined", " card declined ") == 1
    assert accuracy("B", "A") == accuracy("", "A") == accuracy("a", "A") == accuracy("A B", "A") == 0


def test_exact_match_ignores_only_surrounding_whitespace():
    assert exact_match(" yes\n", "yes") == 1
    assert exact_match("yes, sir", "yes") == exact_match("Yes", "yes") == exact_match("a  b", "a b") == 0


def test_rouge_l_by_hand():
    # Lin 2004: "police killed the gunman" against "police kill the gunman" and "the gunman kill police"
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(2 / 4)
    # 2 words in common; 3 written, 5 wanted
    assert rouge_l("A, b x", "a y b z z") == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))


def test_rouge_l_supports_every_script():
    assert rouge_l("über Öl", "Über öl!") == 1
    assert rouge_l("他支持", "他反对") == pytest.approx(1 / 3)
    assert rouge_l("...", "a") == rouge_l("", "a") == 0


def test_edit_similarity_by_hand():
    # 2 insertions and deletions (the last s and t), 6 characters
    assert edit_similarity("abs", "abt") == pytest.approx(1 - 2 / 6)
    assert edit_similarity(" return x\n", "return x") == edit_similarity("", "") == 1
    assert edit_similarity("", "x") == 0


def test_edit_similarity_restores_the_literals_of_py150():
    assert edit_similarity("x = <NUM_LIT:2> + <NUM_LIT> + '<STR_LIT>' + '<STR_LIT:a b>'", "x = 2 + 0 + '' + 'a b'") == 1


@pytest.mark.parametrize("name", METRICS)
@given(prediction=texts, reference=st.text("ab c1é中", min_size=1, max_size=9).filter(str.strip), source=texts)
def test_every_score_is_within_0_and_1_and_the_correct_answer_scores_best(name, prediction, reference, source):
    scores = sample_scores(name, [prediction, reference], [reference] * 2, [source] * 2)
    assert all(0 <= score <= 1 for score in scores)
    assert scores[1] == pytest.approx(1)


def test_the_score_of_a_task_is_the_mean_over_its_samples():
    for name in METRICS:
        columns = (["x", "c"], ["x", "d"], ["y", "c"])
        expected = sum(sample_scores(name, *columns)) / 2
        assert task_score(name, *columns) == pytest.approx(expected) and 0 < expected < 1


def test_an_error_in_a_metric_names_the_sample_with_shortened_texts():
    with pytest.raises(ValueError, match=r"accuracy cannot score sample 2 .*no label") as error:
        task_score("accuracy", ["a", "b" * 500], ["a", "  "], ["", ""])
    assert "'bbb" in str(error.value) and "reference '  '" in str(error.value) and len(str(error.value)) < 250


def test_a_sample_without_a_text_raises_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"cannot score sample 1 .*: prediction None, reference 'x'"):
        sample_scores("rouge_l", [None], ["x"], [""])


def test_nothing_heavy_is_imported_until_a_metric_is_loaded():
    script = (
        "import sys, fggm_peft.continual.metrics, fggm_peft.continual.measures, fggm_peft.continual.stream\n"
        "print([name for name in ('scipy.stats', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "scipy" not in result.stdout
