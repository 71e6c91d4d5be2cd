"""Runs a stream: every method, learning rate, seed and order, each in its own folder, with resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..tuner.files import write_json
from .report import require_report_packages
from .runner import Runner, method_of
from .settings import StreamError
from .stream import MethodSettings, Order, Stream, differences


@dataclass(frozen=True)
class Run:
    """One way through a stream."""

    method: MethodSettings
    learning_rate: float
    seed: int
    order: Order

    @property
    def name(self) -> str:
        """The path of its folder in ``runs``."""
        return f"{self.method.label}/lr{self.learning_rate:g}-seed{self.seed}-{self.order.name.replace(':', '')}"

    def result_file(self, output: Path) -> Path:
        """The file of its result, which exists when it is finished."""
        return output / "runs" / self.name / "run.json"


def runs_of(stream: Stream) -> list[Run]:
    """All runs of a stream, seed by seed, so that a stopped comparison has all methods for some seeds."""
    return [
        Run(method, rate, seed, order)
        for seed in stream.seeds
        for order in stream.task_orders()
        for rate in stream.rates()
        for method in stream.methods
    ]


def run_stream(
    stream: Stream, output: Path, resume: bool = False, checkpoint_steps: int | None = None
) -> Iterator[dict[str, Any]]:
    """Compute all runs that are not finished, and yield the result of every run.

    Several processes may work in one folder: each takes runs that no other process computes, and yields the runs that
    are finished when it reaches them.

    Args:
        output: folder with a subfolder for each run.
        resume: continue in a folder that contains runs.
        checkpoint_steps: steps between checkpoints within a task; None restarts an interrupted task.

    Raises:
        StreamError: the folder contains runs and ``resume`` is False, or runs of another stream (the message names
            the differences); the model is quantized; a method or an option is unknown.
        ImportError: a package that the report needs is not installed.
    """
    _check_runnable(stream, output, resume)
    file = output / "stream.json"
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, stream.fingerprint())
    tokenizer = stream.model.load_tokenizer()
    pending = [run for run in runs_of(stream) if not run.result_file(output).exists()]
    total = sum(len(run.order.tasks) for run in pending)
    with tqdm(total=total, desc="Tasks", unit="task", disable=None) as bar:  # shows the remaining time
        for run in runs_of(stream):
            bar.set_postfix_str(run.name)
            folder = run.result_file(output).parent
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / ".lock", timeout=0):  # the system releases it when a process dies
                    result = Runner(stream, run, folder, tokenizer, checkpoint_steps, bar.update).result()
            except Timeout:
                continue  # another process computes it
            yield result


def finished_runs(stream: Stream, output: Path) -> list[dict[str, Any]]:
    """The results in the folder, computed by any process."""
    files = [run.result_file(output) for run in runs_of(stream)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def all_results(stream: Stream, output: Path) -> list[dict[str, Any]]:
    """The stream's results, then those of other methods, rates, seeds and orders in the folder."""
    others = sorted(set(output.glob("runs/*/*/run.json")) - {run.result_file(output) for run in runs_of(stream)})
    return finished_runs(stream, output) + [json.loads(file.read_text()) for file in others]


def _check_runnable(stream: Stream, output: Path, resume: bool) -> None:
    require_report_packages()
    if stream.model.quantization is not None:
        raise StreamError("sequences need a dense model, because methods change its weights; remove quantization")
    for method in stream.methods:
        method_of(method)  # an unknown option is an error now, not after hours
    file = output / "stream.json"
    if not file.exists():
        return
    if not resume:
        raise StreamError(f"{output} already contains runs; continue with --resume, or choose another folder")
    if changes := differences(stream.fingerprint(), json.loads(file.read_text())):
        raise StreamError(f"the runs in {output} are of another stream: {'; '.join(changes[:3])}")
