"""Runs tests in PEFT's source distribution with FGGM (one method for each granularity) or one of PEFT's methods.

    python tests/integration/peft_suite/run.py "custom models" lora row [pytest arguments]

Downloads only the source distribution of the installed PEFT, once. ``benchmarks/peft_suite.py`` runs all suites.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
GRANULARITIES = ("row", "column", "element")
Outcomes = dict[str, str]
"""Test -> "passed", "skipped" or "failed". A test has the same name for every method."""


@dataclass(frozen=True)
class Suite:
    """A part of PEFT's tests, with the replacements that make it test FGGM.

    Args:
        file: PEFT's test module.
        select: argument of pytest's ``-k``.
        cases: variable of the test module -> variable of ``fggm_suite_cases`` that replaces its value.
        parameter: if given, only tests that have this parameter with the config of the method.
        names: name in the tests -> name in ``stand_ins`` that replaces it when FGGM is tested.
        always: as ``names``, but for every method, because the original needs a network.
        strings: substring of string literals -> replacement when FGGM is tested, such as parameter prefixes.
        theirs: the PEFT methods to compare with; first the one that the tests were written for.
        in_ci: whether ``make test-peft`` runs it.
    """

    file: str
    select: str
    cases: Mapping[str, str] = field(default_factory=dict)
    parameter: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, str] = field(default_factory=dict)
    strings: Mapping[str, str] = field(default_factory=dict)
    theirs: Sequence[str] = ("lora",)
    in_ci: bool = False


SUITES = {
    "custom models": Suite(
        "test_custom_models.py",
        "TestPeftCustomModel or TestMultipleActiveAdapters",
        cases={name: name for name in ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES")},
        parameter="config_cls",
        theirs=("lora", "shira"),
        in_ci=True,
    ),
    "config": Suite(
        "test_config.py",
        "TestPeftConfig",
        cases={"ALL_CONFIG_CLASSES": "ALL_CONFIG_CLASSES"},
        parameter="config_class",
        in_ci=True,
    ),
    # excluded: DoRA (LoRA only), attention that does not call its projection (rejected by FGGM), timing (needs the Hub)
    "mixed batches": Suite(
        "test_custom_models.py",
        "TestMixedAdapterBatches and not dora and not mha and not timing and not RoAd and not GLoRA",
        names={"LoraConfig": "config"},
        in_ci=True,
    ),
    # excluded: tests of LoRA's ranks and scalings
    "hotswap": Suite(
        "test_initialization.py",
        "test_hotswap_works and not groups or different_peft_types or target_adapter_merged or other_adapter_merged",
        names={"LoraConfig": "config"},
        strings={"found: LORA": "found: FGGM"},
        in_ci=True,
    ),
    # excluded: "svd" and "cat" store a sum as low-rank factors
    "weighted adapters": Suite(
        "test_custom_models.py",
        "(add_weighted_adapter and not rank_pattern and not svd and not cat) or "
        "(TestPeftCustomModel and modules_to_save_merging_adapters and not seq_cls)",
        names={"LoraConfig": "config", "lora.LoraLayer": "FGGMLayer"},
    ),
    # excluded: tests of other methods, and the compilation of PEFT's own function
    "conversion to LoRA": Suite(
        "test_lora_conversion.py",
        "TestLoraConversion and not no_peft_layer and not prompt_learning and not no_support and not trainable_bias "
        "and not lora_to_lora and not torch_compile",
        names={"LoKrConfig": "attention_config"},
        always={"AutoModelForCausalLM": "AutoModelForCausalLM"},
        strings={".lokr": ".fggm"},
        theirs=("lokr",),
    ),
    # bitsandbytes and torchao; GPTQ needs models from the Hub and a GPU
    "quantization": Suite(
        "test_quantization.py",
        "TestQuantization",
        cases={"TEST_CASES": "QUANTIZATION_TEST_CASES"},
        always={"AutoModelForCausalLM": "AutoModelOfTwelveLayers"},
        theirs=("shira", "lora"),
    ),
}
_LOADERS = ("Bnb", "TorchAo")
"""Prefixes of the classes that load models in PEFT's quantization tests."""
_METHOD_NAME = re.compile(r"(?<![A-Za-z])(FGGM|LoRA|SHiRA|LoKr)(Config)?(?![A-Za-z])", re.IGNORECASE)
CONFTEST = """
import importlib.machinery
import json
import os
import sys
import types

import torch

outcomes = {}
diffusers = types.ModuleType("diffusers")  # PEFT's helpers import one name, which these tests do not use
diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules["diffusers"] = diffusers

def pytest_runtest_setup(item):
    torch.manual_seed(0)  # tests that set no seed get the same adapters in every run

def is_of_the_method(item):
    method = item.path.stem.removeprefix("test_suite_of_")
    method = "fggm" if method in ("row", "column", "element") else method
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return getattr(parameters.get(os.environ["PEFT_SUITE_PARAMETER"]), "__name__", "").lower().startswith(method)

def pytest_collection_modifyitems(config, items):
    if not os.environ["PEFT_SUITE_PARAMETER"]:
        return
    ours = [item for item in items if is_of_the_method(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome

def pytest_sessionfinish():
    with open("outcomes.json", "w") as file:
        json.dump(outcomes, file)
"""


def source_distribution() -> Path:
    """The archive of the installed PEFT's source distribution, downloaded once for all checkouts."""
    version = importlib.metadata.version("peft")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fggm_peft"
    archive = cache / f"peft-{version}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # pip builds the metadata: without isolation, by the setuptools that torch requires
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--no-build-isolation", "--dest", folder, f"peft=={version}"], check=True)
            next(Path(folder).glob("peft-*.tar.gz")).replace(archive)
    return archive


def extract_tests(folder: Path) -> Path:
    """Extract PEFT's ``tests`` into a folder, as a package with our conftest."""
    with tarfile.open(source_distribution()) as archive:
        for member in archive.getmembers():
            _, _, member.name = member.name.partition("/")
            if member.name.startswith("tests/") and member.name.endswith(".py"):
                archive.extract(member, folder, filter="data")
    (folder / "tests" / "__init__.py").touch()  # missing in the source distribution
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    return folder / "tests"


class StandIns(ast.NodeTransformer):
    """Replaces names and string literals in a test."""

    def __init__(self, method: str, names: Mapping[str, str], strings: Mapping[str, str]):
        self.method, self.names, self.strings = method, names, strings

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
        new = f"__import__('stand_ins').StandIns({self.method!r}).{self.names[name]}"
        return ast.copy_location(ast.parse(new, mode="eval").body, node)


def write_suite(tests: Path, method: str, suite: Suite) -> Path:
    """Write PEFT's test module with the replacements for a method; returns its path."""
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
    ours = method in GRANULARITIES
    names, strings = {**suite.always, **(suite.names if ours else {})}, suite.strings if ours else {}
    if names or strings:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name.startswith(("Test", *_LOADERS)):
                StandIns(method, names, strings).visit(node)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("MIXED_ADAPTER"):
                StandIns(method, names, {}).visit(node)
    path = tests / f"test_suite_of_{method}.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    return path


def run(name: str, methods: Sequence[str], *arguments: str, capture: bool = True) -> dict[str, Outcomes]:
    """Run a suite for methods of PEFT or granularities of FGGM, in one process -> method -> outcomes."""
    suite = SUITES[name]
    with tempfile.TemporaryDirectory() as folder:
        tests = extract_tests(Path(folder))
        files = [str(write_suite(tests, method, suite)) for method in methods]
        python_path = os.pathsep.join([folder, str(HERE), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
        settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PEFT_SUITE_PARAMETER": suite.parameter}
        command = [sys.executable, "-m", "pytest", *files, "-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider"]
        command += ["-k", suite.select, "--rootdir", folder, *arguments]
        environment = {**os.environ, **settings, "PYTHONPATH": python_path}
        result = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=capture)
        written = Path(folder) / "outcomes.json"
        outcomes = json.loads(written.read_text()) if written.exists() else {}
    by_method: dict[str, Outcomes] = {method: {} for method in methods}
    for test, outcome in outcomes.items():
        module, _, rest = test.partition("::")
        by_method[Path(module).stem.removeprefix("test_suite_of_")][_METHOD_NAME.sub("*", rest)] = outcome
    own = {test for method in methods if method in GRANULARITIES for test in by_method[method]}
    if own:  # leave out what PEFT tests with one of its methods by name
        by_method = {method: {t: o for t, o in found.items() if t in own} for method, found in by_method.items()}
    if not all(by_method.values()):
        raise RuntimeError(f"{name} did not run: {(result.stdout or '')[-4000:]}{(result.stderr or '')[-2000:]}")
    return by_method


def run_all(suites: Sequence[str], methods: Sequence[str] | None = None) -> dict[str, dict[str, Outcomes]]:
    """Run suites, two at a time, for FGGM and for ``methods``, by default each suite's methods of PEFT."""
    chosen = [[*(methods or SUITES[name].theirs), *GRANULARITIES] for name in suites]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(suites, pool.map(run, suites, chosen), strict=True))


if __name__ == "__main__":
    own = [argument for argument in sys.argv[2:] if argument in (*GRANULARITIES, "lora", "shira", "lokr")]
    run(sys.argv[1], own, *(argument for argument in sys.argv[2:] if argument not in own), capture=False)
