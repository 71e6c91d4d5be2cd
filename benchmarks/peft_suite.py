"""PEFT's own tests, from its source distribution, and its capability script, for FGGM and for PEFT's methods.

Writes peft_suite.json and peft_capabilities.json in benchmarks/results, and the table in docs/compatibility.md. All
suites take about half an hour.

python benchmarks/peft_suite.py [--suite NAME ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS, write

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "integration" / "peft_suite"
sys.path.insert(0, str(FOLDER))
import run as peft_suite  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
CAPABILITIES = RESULTS / "peft_capabilities.json"
TITLES = {k: f"FGGM, {k}s" for k in peft_suite.GRANULARITIES} | {"lora": "LoRA", "shira": "SHiRA", "lokr": "LoKr"}
OUTCOMES = ("passed", "skipped", "failed")


def count(outcomes: peft_suite.Outcomes) -> dict[str, Any]:
    """The numbers of passed, skipped and failed tests, and the names of those that failed."""
    numbers = Counter(outcomes.values())
    failed = sorted(test for test, outcome in outcomes.items() if outcome == "failed")
    return {**{outcome: numbers[outcome] for outcome in OUTCOMES}, "which failed": failed}


def results() -> dict[str, dict[str, dict[str, Any]]]:
    """Suite -> method -> committed counts."""
    return json.loads((RESULTS / "peft_suite.json").read_text())["results"]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each suite and a column for each method; a cell is empty if the suite was not run with the method."""
    lines = [f"| passed / skipped / failed | {' | '.join(TITLES.values())} |", "|---" * (1 + len(TITLES)) + "|"]
    for suite, methods in results.items():
        counts = [methods.get(method) for method in TITLES]
        cells = ["/".join(str(each[outcome]) for outcome in OUTCOMES) if each else "" for each in counts]
        lines.append(f"| {suite} | {' | '.join(cells)} |")
    return "\n".join(lines)


def capabilities(folder: Path) -> dict[str, dict[str, Any]]:
    """Method -> feature -> value, found by PEFT's capability script for FGGM and LoRA."""
    file = folder / "capabilities.json"
    program = "import sys, runpy, fggm_peft; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = FOLDER / "generate_method_capabilities.py"
    command = [sys.executable, "-c", program, str(script), "--methods", "fggm", "lora", "--output", str(file)]
    subprocess.run([*command, "--docs-dir", str(folder)], check=True, capture_output=True, cwd=ROOT)
    methods = json.loads(file.read_text())["methods"]
    return {
        name: {feature: finding["value"] for feature, finding in methods[name]["features"].items()}
        for name in ("FGGM", "LORA")
    }


def write_into_page(text: str) -> None:
    """Replace the table of the page, which stands between two comments."""
    begin, end = "<!-- counts of benchmarks/peft_suite.py -->\n", "<!-- end -->"
    head, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(f"{head}{begin}{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="*", choices=list(peft_suite.SUITES), default=list(peft_suite.SUITES))
    found = results()
    for suite, methods in peft_suite.run_all(parser.parse_args().suite).items():
        found[suite] = {method: count(outcomes) for method, outcomes in methods.items()}
    write("peft_suite", {name: found[name] for name in peft_suite.SUITES if name in found})
    with tempfile.TemporaryDirectory() as folder:
        CAPABILITIES.write_text(json.dumps(capabilities(Path(folder)), indent=1) + "\n")
    write_into_page(table(results()))


if __name__ == "__main__":
    main()
