"""Runs a stream: every method, learning rate, seed and order, each in a folder of its own that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..tuner.files.atomic import write_json
from .report import require_report_packages
from .runner import Runner, method_of
from .stream import Method, Order, Stream, StreamError


@dataclass(frozen=True)
class Run:
    """One way through a stream."""

    method: Method
    learning_rate: float
    seed: int
    order: Order

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.method.label}/lr{self.learning_rate:g}-seed{self.seed}-{self.order.name.replace(':', '')}"


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
    """Run what is not finished yet, and yield the result of every run.

    Several processes may do so in one folder: each takes runs that no other is at, and yields those that are finished
    when it comes to them.

    Args:
        output: gets a folder for each run.
        resume: go on in a folder that has runs.
        checkpoint_steps: steps between checkpoints within a task; None starts an interrupted task anew.

    Raises:
        StreamError: the folder has runs and ``resume`` is False, or they are of another stream (says what differs);
            the model is quantized; a method or an option is unknown.
        ImportError: a package that the report needs is not installed.
    """
    check_runnable(stream, output, resume)
    file = output / "stream.json"
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(file, stream.fingerprint())
    tokenizer = stream.model.load_tokenizer()
    pending = [run for run in runs_of(stream) if not (output / "runs" / run.name / "run.json").exists()]
    total = sum(len(run.order.tasks) for run in pending)
    with tqdm(total=total, desc="Tasks", unit="task", disable=None) as bar:  # shows the remaining time
        for run in runs_of(stream):
            bar.set_postfix_str(run.name)
            folder = output / "runs" / run.name
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / ".lock", timeout=0):  # let go of by the system when a process dies
                    result = Runner(stream, run, folder, tokenizer, checkpoint_steps, bar.update).result()
            except Timeout:
                continue  # another process is at it
            yield result


def finished_runs(stream: Stream, output: Path) -> list[dict[str, Any]]:
    """The results that are in the folder, whichever process computed them."""
    files = [output / "runs" / run.name / "run.json" for run in runs_of(stream)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def all_results(stream: Stream, output: Path) -> list[dict[str, Any]]:
    """The stream's results, and behind them those of other methods, rates, seeds and orders that are in the folder."""
    mine = [output / "runs" / run.name / "run.json" for run in runs_of(stream)]
    others = sorted(set(output.glob("runs/*/*/run.json")) - set(mine))
    return finished_runs(stream, output) + [json.loads(file.read_text()) for file in others]


def check_runnable(stream: Stream, output: Path, resume: bool = False) -> None:
    """Raise what ``run_stream`` would raise before it starts; nothing is loaded or written."""
    require_report_packages()
    if stream.model.quantization is not None:
        raise StreamError("sequences run on dense models: a run is resumed from the weights that its methods changed")
    for method in stream.methods:
        method_of(method)  # an unknown option should be known now, not after hours
    file = output / "stream.json"
    if not file.exists():
        return
    if not resume:
        raise StreamError(f"{output} has runs already; go on with --resume, or name another folder")
    if difference := stream.difference(json.loads(file.read_text())):
        raise StreamError(f"the runs in {output} are of another stream: {'; '.join(difference[:3])}")
