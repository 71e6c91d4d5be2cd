"""PEFT's own tests of custom models pass with FGGM as they do with LoRA."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "peft_suite"))
import run as peft_suite

pytestmark = pytest.mark.slow


def outcomes(method: str) -> Counter:
    """Count how often each test passed, failed or was skipped, on the models that both methods support."""
    result = peft_suite.run(method, "-vv")
    lines = re.findall(r"::(\w+)\[.*?\] (PASSED|FAILED|SKIPPED|ERROR)", result.stdout)
    assert lines, result.stdout[-2000:] + result.stderr[-2000:]
    return Counter(lines)


def test_no_peft_test_fails_and_at_least_as_many_pass_as_with_lora():
    ours, theirs = outcomes("fggm"), outcomes("lora")
    assert not [key for key in ours if key[1] in ("FAILED", "ERROR")]
    for (name, outcome), count in theirs.items():
        if outcome == "PASSED":  # FGGM tests every model once for each granularity
            assert ours[name, "PASSED"] >= count, name
