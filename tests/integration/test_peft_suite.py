"""PEFT's own tests and its capability script: FGGM does what LoRA does, and the committed results are up to date."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft_suite as committed  # benchmarks/peft_suite.py
import pytest

HERE = Path(__file__).parent / "peft_suite"
sys.path.insert(0, str(HERE))
import run as suites  # noqa: E402

IN_CI = [name for name, suite in suites.SUITES.items() if suite.in_ci]


@pytest.fixture(scope="module")
def outcomes():
    return suites.run_all(IN_CI, ["lora"])


@pytest.mark.peft
@pytest.mark.parametrize("granularity", suites.GRANULARITIES)
@pytest.mark.parametrize("name", IN_CI)
def test_every_test_of_peft_has_the_outcome_that_it_has_with_lora(name, granularity, outcomes):
    """So a test may fail only if LoRA fails on the same model."""
    ours, theirs = outcomes[name][granularity], outcomes[name]["lora"]
    assert ours.keys() == theirs.keys()
    assert {test: outcome for test, outcome in ours.items() if outcome not in ("passed", theirs[test])} == {}


@pytest.mark.peft
@pytest.mark.parametrize("name", IN_CI)
def test_the_committed_counts_are_up_to_date(name, outcomes):
    """``python benchmarks/peft_suite.py`` writes them."""
    results = committed.results()[name]
    for method in ("lora", *suites.GRANULARITIES):
        assert results[method] == committed.count(outcomes[name][method]), method


def test_the_page_shows_the_committed_counts():
    assert committed.table(committed.results()) in committed.PAGE.read_text()


def test_fggm_has_the_capabilities_of_lora_except_those_that_the_page_names():
    fggm, lora = json.loads(committed.CAPABILITIES.read_text()).values()
    differences = {feature for feature in fggm if fggm[feature] != lora[feature]}
    assert differences == {"peft_mixed_model", "extras", "paper_url"}


def test_pefts_capability_script_finds_what_is_committed(tmp_path):
    """Among its checks are the names that PEFT uses for mixed batches, weighted adapters and hotswapping."""
    assert committed.capabilities(tmp_path) == json.loads(committed.CAPABILITIES.read_text())
