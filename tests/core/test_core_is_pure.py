"""``core`` imports torch only, so it works without PEFT and without a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fggm_peft"
MODULES = sorted(path.stem for path in (PACKAGE / "core").glob("*.py") if path.stem != "__init__")
SCRIPT = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module("core." + name)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def loaded():
    command = [sys.executable, "-c", SCRIPT, str(PACKAGE), *MODULES]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_the_core_works_as_a_separate_package(loaded):
    assert {"granularity", "linear", "threshold", "criteria", "per_sample"} <= set(MODULES)
    assert {"core", "torch"} <= loaded


@pytest.mark.parametrize("library", ["peft", "transformers", "accelerate", "bitsandbytes", "fggm_peft"])
def test_importing_the_core_does_not_load(library, loaded):
    assert library not in loaded
