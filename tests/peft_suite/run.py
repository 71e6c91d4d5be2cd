"""Runs PEFT's own custom-model tests, from its source distribution, against a method of ours or theirs.

    python tests/peft_suite/run.py fggm [pytest arguments]
    python tests/peft_suite/run.py lora

Downloads the source distribution of the installed PEFT and nothing else. Needs ``diffusers``,
``parameterized`` and ``scikit-learn``, which PEFT's test modules import.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
REPLACED = ("TEST_CASES", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES")
# Only what is parametrised with the method under trial; the rest of the file tests LoRA and others.
CONFTEST = """
def pytest_collection_modifyitems(config, items):
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


def write_suite(tests: Path, method: str) -> Path:
    """PEFT's module of custom-model tests with our cases in the place of its own."""
    tree = ast.parse((tests / "test_custom_models.py").read_text())
    replaced = 0
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in REPLACED:
            name = node.targets[0].id  # type: ignore[attr-defined]
            node.value = ast.parse(f"__import__('fggm_suite_cases').{name}[{method!r}]", mode="eval").body
            replaced += 1
    if replaced != len(REPLACED):
        raise RuntimeError(f"PEFT's test module no longer defines {REPLACED}; adapt {Path(__file__).name}")
    suite = tests / f"test_suite_of_{method}.py"
    suite.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    (tests / "conftest.py").write_text(CONFTEST)
    (tests / "__init__.py").touch()  # the source distribution leaves it out
    return suite


def run(method: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run the suite in a process of its own; its last line holds the counts."""
    tests = fetch_tests()
    suite = write_suite(tests, method)
    path = os.pathsep.join([str(tests.parent), str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", str(suite), "-q", "--tb=line", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-k", "TestPeftCustomModel or TestMultipleActiveAdapters", "--rootdir", str(tests.parent), *arguments]
    return subprocess.run(command, env=environment, cwd=tests.parent, text=True, capture_output=True)


if __name__ == "__main__":
    result = run(*sys.argv[1:])
    print(result.stdout + result.stderr)
    sys.exit(result.returncode)
