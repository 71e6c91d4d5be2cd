"""FGGM beside PEFT's methods and full fine-tuning: time and memory of a step, selection, files, merging, import.

Quick by default (about three minutes; nothing is written unless --output says where). ``--full`` takes half an hour
on a quiet core and writes benchmarks/results/suite.json, case by case, and then docs/benchmarks.md and its chart.

PYTHONPATH=benchmarks python -m suite [--full] [--only NAME ...] [--output FILE] [--page]
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

from common import RESULTS, machine, show
from tqdm.auto import tqdm

from . import cases
from .goals import verdicts
from .measurements import MEASUREMENTS, measure
from .report import write_page

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
SECONDS = {"quick": 5.0, "full": 25.0}
"""About how long one timing of a case goes on, unless that is less than three rounds."""


def run(todo: list[cases.Case], seconds: float, output: Path | None) -> dict:
    """Measure case after case; what is there is written after each, so that a stop loses nothing."""
    contents = {"machine": machine(), "results": {}}
    progress = tqdm(todo, desc="cases")
    for case in progress:
        progress.set_postfix_str(case.key)
        for name, table in measure(case.measurement, case.setting, seconds).items():
            key = name if case.measurement == "import" else f"{name}: {case.setting.text()}"
            contents["results"][key] = table
            show(f"{key} (noise {table['noise']:.2f})", table["rows"])
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(contents, indent=1) + "\n")
        gc.collect()
    return contents


def show_goals(results: dict) -> None:
    rows = {
        verdict.goal.what: {
            "goal": verdict.goal.limit,
            "best": min(verdict.ratios.values()),
            "worst": max(verdict.ratios.values()),
            "met": float(verdict.met),
        }
        for verdict in verdicts(results)
        if verdict.ratios
    }
    show("goals", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, written to results and docs")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), help="these measurements alone")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md from results/suite.json, only")
    arguments = parser.parse_args()
    stored = RESULTS / "suite.json"
    if arguments.page:
        write_page(json.loads(stored.read_text()), PAGE)
        return
    todo = cases.full() if arguments.full else cases.quick()
    todo = [case for case in todo if arguments.only is None or case.measurement in arguments.only]
    whole = arguments.full and arguments.only is None
    output = arguments.output or (stored if whole else None)
    contents = run(todo, SECONDS["full" if arguments.full else "quick"], output)
    show_goals(contents["results"])
    if whole:
        write_page(contents, PAGE)
    print("written to" if output else "nothing was written; --output FILE keeps the figures", output or "")


if __name__ == "__main__":
    main()
