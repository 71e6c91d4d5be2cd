#!/usr/bin/env python
"""Tunes the learning rate of each method and runs the study's streams with it.

    python benchmarks/study/run.py study-data

``study-data`` is the folder of ``prepare.py``. The command may be stopped and repeated at any time, also on another
machine: it computes only the runs whose result is not in ``benchmarks/results/retention``. Several processes can share
the work. Runs go seed by seed, so that the report in each stream's folder soon contains all methods.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.report import read_results, write_report
from fggm_peft.continual.run import run_stream, runs_of
from fggm_peft.continual.stream import Stream

HERE = Path(__file__).parent
STREAMS = ("code", "intents", "generation", "mixed")
RATES = HERE / "rates.yaml"
RESULTS = HERE.parent / "results" / "retention"
WAIT = 60  # seconds
HARMLESS = 0.05  # nats


def main() -> None:
    """Tune, then run the streams."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the model and the data, from prepare.py")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder with one folder for each stream")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=STREAMS, help="default: all")
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="default: all")
    parser.add_argument("--tune-only", action="store_true", help="only choose the learning rates")
    arguments = parser.parse_args()
    plan = yaml.safe_load(RATES.read_text())
    labels = arguments.methods or list(plan["rates"])
    rates = tuned_rates(arguments.data, arguments.output / "tuning", {label: plan["rates"][label] for label in labels})
    if arguments.tune_only:
        return
    streams = {name: stream_of(f"retention-{name}", arguments.data) for name in arguments.streams}
    for name, stream in parts(streams, labels, rates, plan["once"]):
        compute(stream, arguments.output / name)
    for name in streams:
        write_report(arguments.output / name, read_results([arguments.output / name]))


def stream_of(name: str, data: Path, **overrides: Any) -> Stream:
    """The stream of a file in this folder."""
    return read_stream(HERE / f"{name}.yaml", data=data, model=data / "model", **overrides)


def tuned_rates(data: Path, output: Path, candidates: Mapping[str, list[float]]) -> dict[str, float]:
    """Label -> the learning rate that ``best_rate`` picks on the tuning stream. Waits for runs of other processes."""
    streams = [stream_of("tuning", data, learning_rates=own).with_methods([label]) for label, own in candidates.items()]
    for stream in streams:
        compute(stream, output)
    while any(unfinished(stream, output) for stream in streams):
        time.sleep(WAIT)
        for stream in streams:
            compute(stream, output)  # of a process that was stopped
    results, rates = read_results([output]), {}
    for label, own in candidates.items():
        rates[label] = best_rate([run for run in results if run["label"] == label])
        if rates[label] in (min(own), max(own)):
            print(f"{label}: the best rate {rates[label]:g} is at the end of {own}", file=sys.stderr)
    return rates


def best_rate(runs: Sequence[Mapping[str, Any]]) -> float:
    """The rate with the highest OP among those that change the loss on other text by at most ``HARMLESS`` nats.

    If no rate is harmless, it is the one with the highest OP.
    """
    harmless = [run for run in runs if (run["other"] or 0.0) <= HARMLESS] or runs
    return max(harmless, key=lambda run: (run["op"], -run["learning_rate"]))["learning_rate"]


def parts(
    streams: Mapping[str, Stream], labels: list[str], rates: Mapping[str, float], once: list[str]
) -> Iterator[tuple[str, Stream]]:
    """Streams of one run each, seed by seed."""
    first = next(iter(streams.values()))
    for seed in first.seeds:
        for order in first.orders:
            for name, stream in streams.items():
                for label in labels:
                    if label not in once or (seed, order) == (first.seeds[0], first.orders[0]):
                        single = {"seeds": (seed,), "orders": (order,), "learning_rates": (rates[label],)}
                        yield name, stream.with_methods([label]).model_copy(update=single)


def unfinished(stream: Stream, output: Path) -> int:
    """The number of runs without a result."""
    return sum(not run.is_finished(output) for run in runs_of(stream))


def compute(stream: Stream, output: Path) -> None:
    """Compute the runs that are not finished and that no other process computes, and update the report."""
    if unfinished(stream, output):
        for _ in run_stream(stream, output, resume=True):
            for run in runs_of(stream):
                if run.is_finished(output):  # the deltas of all runs would fill the disk
                    shutil.rmtree(run.folder(output) / "tasks", ignore_errors=True)
            write_report(output, read_results([output]), page=False)


if __name__ == "__main__":
    main()
