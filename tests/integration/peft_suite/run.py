"""Runs the tests in PEFT's source distribution with FGGM or one of PEFT's methods.

    python tests/integration/peft_suite/run.py fggm [pytest arguments]
    python tests/integration/peft_suite/run.py lora

Downloads only the source distribution of the installed PEFT. Requires ``diffusers``, ``parameterized`` and
``scikit-learn``, which PEFT's test modules import. ``benchmarks/peft_suite.py`` runs all suites.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """A part of PEFT's tests, with the replacements that make it test FGGM.

    Args:
        file: PEFT's test module.
        select: argument of pytest's ``-k``.
        cases: variable of the test module -> variable of ``fggm_suite_cases`` that replaces its value.
        names: name in the tests -> name in ``stand_ins`` that replaces it when FGGM is tested.
        always: as ``names``, but for every method, because the original needs a network.
        strings: substring of string literals -> replacement when FGGM is tested, such as parameter prefixes.
        theirs: the PEFT method that the tests were written for.
    """

    file: str
    select: str
    cases: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, str] = field(default_factory=dict)
    strings: Mapping[str, str] = field(default_factory=dict)
    theirs: str = "lora"


SUITES = {
    "custom models": Suite(
        "test_custom_models.py",
        "TestPeftCustomModel or TestMultipleActiveAdapters",
        cases={name: name for name in ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES")},
    ),
    # excluded: DoRA (LoRA only), attention that does not call its projection (rejected by FGGM), timing (needs the Hub)
    "mixed batches": Suite(
        "test_custom_models.py",
        "TestMixedAdapterBatches and not dora and not mha and not timing and not RoAd and not GLoRA",
        names={"LoraConfig": "config"},
    ),
    # excluded: "svd" and "cat" store a sum as low-rank factors
    "weighted adapters": Suite(
        "test_custom_models.py",
        "(add_weighted_adapter and not rank_pattern and not svd and not cat) or "
        "(TestPeftCustomModel and modules_to_save_merging_adapters and not seq_cls)",
        names={"LoraConfig": "config", "lora.LoraLayer": "FGGMLayer"},
    ),
    # excluded: tests of LoRA's ranks and scalings
    "hotswap": Suite(
        "test_initialization.py",
        "test_hotswap_works and not groups or different_peft_types or target_adapter_merged or other_adapter_merged",
        names={"LoraConfig": "config", "hotswap_adapter": "hotswap_adapter"},
        strings={"found: LORA": "found: FGGM"},
    ),
    # excluded: tests of other methods, and the compilation of PEFT's own function
    "conversion to LoRA": Suite(
        "test_lora_conversion.py",
        "TestLoraConversion and not no_peft_layer and not prompt_learning and not no_support and not trainable_bias "
        "and not lora_to_lora and not torch_compile",
        names={"LoKrConfig": "attention_config"},
        always={"AutoModelForCausalLM": "AutoModelForCausalLM"},
        strings={".lokr": ".fggm"},
        theirs="lokr",
    ),
    # bitsandbytes and torchao; GPTQ needs models from the Hub and a GPU
    "quantization": Suite(
        "test_quantization.py",
        "TestQuantization",
        cases={"TEST_CASES": "QUANTIZATION_TEST_CASES"},
        always={"AutoModelForCausalLM": "AutoModelOfTwelveLayers"},
        theirs="shira",
    ),
}
_LOADERS = ("Bnb", "TorchAo")
"""Prefixes of the classes that load models in PEFT's quantization tests."""
CONFTEST = """
import os
import torch

def pytest_runtest_setup(item):
    torch.manual_seed(0)  # tests that set no seed get the same adapters in every run

def pytest_collection_modifyitems(config, items):
    if os.environ["PEFT_SUITE"] != "custom models":
        return
    # run only tests that are parametrized with the method; the rest of the file tests LoRA and other methods
    ours = [i for i in items if "config_cls" in getattr(getattr(i, "callspec", None), "params", {})]
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours
"""


def fetch_tests() -> Path:
    """The ``tests`` folder of the installed PEFT's source distribution, downloaded once."""
    version = importlib.metadata.version("peft")
    root = Path(tempfile.gettempdir()) / f"peft-{version}-tests"
    if not (root / "tests").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(root), f"peft=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(next(root.glob("peft-*.tar.gz"))) as archive:
            for member in archive.getmembers():
                _, _, path = member.name.partition("/")
                if path.startswith("tests/"):
                    member.name = path
                    archive.extract(member, root, filter="data")
    return root / "tests"


class StandIns(ast.NodeTransformer):
    """Replaces names and string literals in a test."""

    def __init__(self, names: Mapping[str, str], strings: Mapping[str, str]):
        self.names, self.strings = names, strings

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._replaced(node.id, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return self._replaced(ast.unparse(node), node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        for old, new in self.strings.items():
            if isinstance(node.value, str):
                node = ast.copy_location(ast.Constant(node.value.replace(old, new)), node)
        return node

    def _replaced(self, name: str, node: ast.AST) -> ast.AST:
        if name not in self.names or not isinstance(getattr(node, "ctx", None), ast.Load):
            return node
        return ast.copy_location(ast.parse(f"__import__('stand_ins').{self.names[name]}", mode="eval").body, node)


def write_suite(tests: Path, method: str, suite: Suite) -> Path:
    """Write PEFT's test module with the suite's replacements; returns its path."""
    tree = ast.parse((tests / suite.file).read_text())
    replaced = 0
    for node in tree.body:
        name = getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else None
        if name == "TEST_CASES" and name not in suite.cases:
            node.value = ast.List([], ast.Load())  # skip collecting thousands of tests
        if name in suite.cases:
            node.value = ast.parse(f"__import__('fggm_suite_cases').{suite.cases[name]}[{method!r}]", mode="eval").body
            replaced += 1
    if replaced != len(suite.cases):
        raise RuntimeError(f"PEFT's test module no longer defines {list(suite.cases)}; adapt {Path(__file__).name}")
    ours = method == "fggm"
    names = {**suite.always, **(suite.names if ours else {})}
    classes = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith(("Test", *_LOADERS))
    ]
    if names or (ours and suite.strings):
        for node in classes:
            StandIns(names, suite.strings if ours else {}).visit(node)
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("MIXED_ADAPTER"):
                StandIns(names, {}).visit(node)
    path = tests / f"test_suite_of_{method}.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "__init__.py").touch()  # missing in the source distribution
    return path


def run(method: str, *arguments: str, suite: str = "custom models", granularity: str = "row"):
    """Run a suite in a separate process; the last line of its output contains the counts."""
    tests = fetch_tests()
    path = write_suite(tests, method, SUITES[suite])
    python_path = os.pathsep.join(
        [str(tests.parent), str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    environment |= {"PEFT_SUITE": suite, "FGGM_GRANULARITY": granularity}
    command = [sys.executable, "-m", "pytest", str(path), "-q", "--tb=line", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-k", SUITES[suite].select, "--rootdir", str(tests.parent), *arguments]
    return subprocess.run(command, env=environment, cwd=tests.parent, text=True, capture_output=True)


if __name__ == "__main__":
    result = run(*sys.argv[1:])
    print(result.stdout + result.stderr)
    sys.exit(result.returncode)
