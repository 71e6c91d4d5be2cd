"""PEFT's own tests, from its source distribution, for FGGM and for the methods that they were written for.

Writes the counts to benchmarks/results/peft_suite.json and the table in docs/compatibility.md. Needs ``diffusers``,
``parameterized`` and ``scikit-learn``, which PEFT's test modules import. Takes about half an hour.

python benchmarks/peft_suite.py [--suite NAME ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS, write

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "integration" / "peft_suite"))
import run as peft_suite  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table of benchmarks/peft_suite.py -->", "<!-- end -->"
GRANULARITIES = ("row", "column", "element")
OUTCOMES = ("passed", "skipped", "failed")


def count(suite: str, method: str, granularity: str = "row") -> dict[str, Any]:
    """The numbers of passed, skipped and failed tests, and the names of those that failed."""
    result = peft_suite.run(method, "-rfE", suite=suite, granularity=granularity)
    last = result.stdout.strip().splitlines()[-1]
    numbers = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|errors?)", last)}
    if not numbers.get("passed"):
        raise RuntimeError(f"{suite} did not run for {method}: {result.stdout[-2000:]}{result.stderr[-2000:]}")
    counts: dict[str, Any] = {outcome: numbers.get(outcome, 0) for outcome in OUTCOMES}
    counts["failed"] += numbers.get("error", 0) + numbers.get("errors", 0)
    counts["which failed"] = re.findall(r"^(?:FAILED|ERROR) \S+::(.+?)(?: - |$)", result.stdout, re.MULTILINE)
    return counts


def measure(suite: str) -> dict[str, dict[str, Any]]:
    """The counts for FGGM over all granularities, and for PEFT's methods."""
    methods = {"custom models": ("fggm", "lora", "shira"), "quantization": ("fggm", "lora", "shira")}
    if suite in methods:  # their cases include all granularities
        return {method: count(suite, method) for method in methods[suite]}
    total: Counter = Counter()
    failed: list[str] = []
    for granularity in GRANULARITIES:
        counts = count(suite, "fggm", granularity)
        failed += [f"{granularity}: {name}" for name in counts.pop("which failed")]
        total.update(counts)
    ours = {**{outcome: total[outcome] for outcome in OUTCOMES}, "which failed": failed}
    theirs = peft_suite.SUITES[suite].theirs
    return {"fggm": ours, theirs: count(suite, theirs)}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| PEFT's tests of | method | passed | skipped | failed |", "|---|---|---:|---:|---:|"]
    titles = {"fggm": "FGGM, every granularity", "lora": "LoRA", "shira": "SHiRA", "lokr": "LoKr"}
    for suite, methods in results.items():
        for method, counts in methods.items():
            numbers = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
            lines.append(f"| {suite} | {titles[method]} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=list(peft_suite.SUITES), default=list(peft_suite.SUITES))
    chosen = parser.parse_args().suite
    path = RESULTS / "peft_suite.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    for suite in chosen:
        before[suite] = measure(suite)
        print(suite, before[suite], flush=True)
        results = {name: before[name] for name in peft_suite.SUITES if name in before}
        write("peft_suite", results)
        text = PAGE.read_text()
        head, _, rest = text.partition(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
