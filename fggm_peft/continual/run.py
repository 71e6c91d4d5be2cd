"""Runs a stream: every method, learning rate, seed and order, each in its own folder, with resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..selection.processes import Processes
from ..training.base_model import launched_with_fsdp, this_process
from ..tuner.files import file_name, require_writable, user_path, write_json
from ..tuner.files.atomic import PARTIAL
from .live import LiveTable
from .report import require_report_packages
from .runner import Runner
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
        label, order = file_name(self.method.label), file_name(self.order.name.replace(":", ""))
        return f"{label}/lr{self.learning_rate:g}-seed{self.seed}-{order}"

    def folder(self, output: Path) -> Path:
        """Its folder in an output folder."""
        return output / "runs" / self.name

    def is_finished(self, output: Path) -> bool:
        """Whether any process has computed its result."""
        return (self.folder(output) / "run.json").exists()


def runs_of(stream: Stream) -> list[Run]:
    """All runs of a stream, seed by seed, so that a stopped comparison has all methods for some seeds."""
    return [
        Run(method, rate, seed, order)
        for seed in stream.seeds
        for order in stream.task_orders()
        for method in stream.methods
        for rate in stream.rates(method)
    ]


def run_stream(
    stream: Stream, output: Path, resume: bool = False, checkpoint_steps: int | None = None
) -> Iterator[dict[str, Any]]:
    """Compute all runs that are not finished, and yield the result of every run.

    Several processes may work in one folder: each takes runs that no other process computes, and yields the runs that
    are finished when it reaches them. The processes of ``accelerate launch`` compute each run together.

    Args:
        output: folder with a subfolder for each run.
        resume: continue in a folder that contains runs.
        checkpoint_steps: steps between checkpoints within a task; None restarts an interrupted task.

    Raises:
        StreamError: the folder contains runs and ``resume`` is False, or runs of another stream; the message names
            the differences. Or the launched processes cannot divide the batches.
        ImportError: a package that the report needs is not installed.
    """
    processes, output = _launched_processes(stream), user_path(output).resolve()
    with processes.together("writing the output"):
        if processes.rank == 0:
            begin_output(stream, output, resume)
    tokenizer, runs = stream.model.load_tokenizer(), runs_of(stream)
    with LiveTable(runs, output) if processes.rank == 0 else nullcontext():
        for run in runs:
            folder = run.folder(output)
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / ".lock", processes) as is_locked:
                if not is_locked:
                    continue  # another process computes it
                for partial in folder.glob(f"*{PARTIAL}"):  # of a process that was killed
                    partial.unlink(missing_ok=True)
                result = Runner(stream, run, folder, tokenizer, checkpoint_steps).result()
            yield result


def begin_output(stream: Stream, output: Path, resume: bool) -> None:
    """Write ``stream.json``, or compare it with the stream; the errors of ``run_stream``."""
    require_report_packages()
    require_writable(output)
    file = output / "stream.json"
    if not file.exists():
        write_json(file, stream.fingerprint())
    elif not resume:
        raise StreamError(f"{output} already contains runs; continue with --resume, or choose another folder")
    elif changes := differences(stream.fingerprint(), json.loads(file.read_text())):
        raise StreamError(f"the runs in {output} are of another stream: {'; '.join(changes[:3])}")


def _launched_processes(stream: Stream) -> Processes:
    """The processes that compute each run together."""
    if launched_with_fsdp():
        raise StreamError("a sequence cannot shard the model; configure accelerate launch without FSDP")
    size = this_process().num_processes  # connects them
    if stream.training.batch_size % size:
        raise StreamError(f"training.batch_size: {stream.training.batch_size} is not divisible by {size} processes")
    return Processes()


@contextmanager
def _locked(file: Path, processes: Processes) -> Iterator[bool]:
    """Whether the first process got the lock, for all processes. The system releases it when that process dies."""
    with ExitStack() as stack:
        is_locked = True
        if processes.rank == 0:
            try:
                stack.enter_context(FileLock(file, timeout=0))
            except Timeout:
                is_locked = False
        yield processes.gather(is_locked)[0]
