"""FGGM against PEFT's methods and full fine-tuning: time and memory of a step, selection, files, merging, import.

The default takes about three minutes and writes nothing without --output. ``--full`` takes half an hour on an idle
core. It writes benchmarks/results/suite.json after each case, and in the end docs/benchmarks.md and its chart.

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
"""Approximate duration of one timing of a case, which has at least three rounds."""


def run(todo: list[cases.Case], seconds: float, output: Path | None) -> dict:
    """Measure all cases. The results are written after each case, so that an interrupted run loses nothing."""
    contents = {"machine": machine(), "results": {}}
    progress = tqdm(todo, desc="cases")
    for case in progress:
        progress.set_postfix_str(case.key)
        for key, table in measure(case, seconds).items():
            contents["results"][key] = table
            show(f"{key} (noise {table['noise']:.2f})", table["rows"])
            for name, text in table.get("failed", {}).items():
                print(f"{name} failed: {text}")
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
    parser.add_argument("--full", action="store_true", help="measure everything, and write results and docs")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), help="only these measurements")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--page", action="store_true", help="only write docs/benchmarks.md from results/suite.json")
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
    print("written to" if output else "nothing was written; pass --output FILE to save the results", output or "")


if __name__ == "__main__":
    main()
