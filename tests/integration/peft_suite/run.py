"""Runs PEFT's own tests, from its source distribution, against a method of ours or theirs.

    python tests/integration/peft_suite/run.py fggm [pytest arguments]
    python tests/integration/peft_suite/run.py lora

Downloads the source distribution of the installed PEFT and nothing else. Needs ``diffusers``,
``parameterized`` and ``scikit-learn``, which PEFT's test modules import. ``benchmarks/peft_suite.py`` runs all suites.
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
    """A part of PEFT's tests, and what is put in the place of what it tests.

    Args:
        file: PEFT's test module.
        select: pytest's ``-k``.
        cases: assignments whose value ``fggm_suite_cases`` gives for each method, and the names there.
        names: names that ``stand_ins`` replaces when FGGM is tested, and the names there.
        always: the same for every method, because the original needs a network.
        strings: parts of strings, such as the prefix of parameters, that change with the names.
        theirs: which of PEFT's methods the tests are written for.
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
    # DoRA is of LoRA alone, attention that never calls its projection is refused by FGGM, and the timing needs the Hub
    "mixed batches": Suite(
        "test_custom_models.py",
        "TestMixedAdapterBatches and not dora and not mha and not timing and not RoAd and not GLoRA",
        names={"LoraConfig": "config"},
    ),
    # "svd" and "cat" are ways to store a sum in factors
    "weighted adapters": Suite(
        "test_custom_models.py",
        "(add_weighted_adapter and not rank_pattern and not svd and not cat) or "
        "(TestPeftCustomModel and modules_to_save_merging_adapters and not seq_cls)",
        names={"LoraConfig": "config", "lora.LoraLayer": "FGGMLayer"},
    ),
    # the others look at LoRA's ranks and scalings, which a support has none of
    "hotswap": Suite(
        "test_initialization.py",
        "test_hotswap_works and not groups or different_peft_types or target_adapter_merged or other_adapter_merged",
        names={"LoraConfig": "config", "hotswap_adapter": "hotswap_adapter"},
        strings={"found: LORA": "found: FGGM"},
    ),
    # what is left out tests other methods; the compilation is of PEFT's own function
    "conversion to LoRA": Suite(
        "test_lora_conversion.py",
        "TestLoraConversion and not no_peft_layer and not prompt_learning and not no_support and not trainable_bias "
        "and not lora_to_lora and not torch_compile",
        names={"LoKrConfig": "attention_config"},
        always={"AutoModelForCausalLM": "AutoModelForCausalLM"},
        strings={".lokr": ".fggm"},
        theirs="lokr",
    ),
    # bitsandbytes and torchao; GPTQ's models are on the Hub and need a GPU
    "quantization": Suite(
        "test_quantization.py",
        "TestQuantization",
        cases={"TEST_CASES": "QUANTIZATION_TEST_CASES"},
        always={"AutoModelForCausalLM": "AutoModelOfTwelveLayers"},
        theirs="shira",
    ),
}
_LOADERS = ("Bnb", "TorchAo")
"""How the classes begin that load the models of PEFT's tests of quantization."""
CONFTEST = """
import os
import torch

def pytest_runtest_setup(item):
    torch.manual_seed(0)  # adapters of tests that leave the seed alone are the same in every run

def pytest_collection_modifyitems(config, items):
    if os.environ["PEFT_SUITE"] != "custom models":
        return
    # only what is parametrised with the method under trial; the rest of the file tests LoRA and others
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
    """Puts other names and strings in the place of those in a test."""

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
    """PEFT's test module with our cases and names in the place of its own."""
    tree = ast.parse((tests / suite.file).read_text())
    replaced = 0
    for node in tree.body:
        name = getattr(node.targets[0], "id", None) if isinstance(node, ast.Assign) else None
        if name == "TEST_CASES" and name not in suite.cases:
            node.value = ast.List([], ast.Load())  # thousands of tests, which need not be collected
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
    (tests / "__init__.py").touch()  # the source distribution leaves it out
    return path


def run(method: str, *arguments: str, suite: str = "custom models", granularity: str = "row"):
    """Run a suite in a process of its own; its last line holds the counts."""
    tests = fetch_tests()
    path = write_suite(tests, method, SUITES[suite])
    places = os.pathsep.join([str(tests.parent), str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    environment |= {"PEFT_SUITE": suite, "FGGM_GRANULARITY": granularity}
    command = [sys.executable, "-m", "pytest", str(path), "-q", "--tb=line", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-k", SUITES[suite].select, "--rootdir", str(tests.parent), *arguments]
    return subprocess.run(command, env=environment, cwd=tests.parent, text=True, capture_output=True)


if __name__ == "__main__":
    result = run(*sys.argv[1:])
    print(result.stdout + result.stderr)
    sys.exit(result.returncode)
