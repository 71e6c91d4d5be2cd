"""``fggm sequence --processes``: several processes of the command, each with a share of the machine."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..continual.live import LiveTable

if TYPE_CHECKING:
    from ..continual.run import Run

MAIN = "from fggm_peft.cli import main; main()"
OPTIONS = ("model", "data", "seeds", "orders", "learning_rates", "methods", "checkpoint_steps")
WARNING = "fggm: warning:"


def compute_together(args: Namespace, runs: Sequence[Run]) -> None:
    """Compute the runs that are not finished in several processes of this command.

    The processes divide the threads of the processor and the visible CUDA devices. Their warnings are printed at the
    end.

    Raises:
        RuntimeError: a process failed; with its last line and its log, which stays in the output folder.
    """
    count = min(args.processes, sum(not run.is_finished(args.output) for run in runs))
    name = f"process-{platform.node()}-{os.getpid()}"  # other machines may work in the same folder
    logs = [args.output / f"{name}-{number}.log" for number in range(count)]
    with ExitStack() as stack:
        stack.enter_context(_sigterm_as_exception())
        children = []
        for number, log in enumerate(logs):
            output = stack.enter_context(log.open("w"))
            environment = {**os.environ, **_share(number, count)}
            child = subprocess.Popen(_command(args), env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(_end, child)
            children.append(child)
        stack.enter_context(LiveTable(runs, args.output, transient=True))
        codes = [child.wait() for child in children]
    for code, log in zip(codes, logs, strict=True):
        if code:
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise RuntimeError(f"a process {ended}: {(_lines(log) or ['no output'])[-1]} ({log})")
    warnings = dict.fromkeys(line for log in logs for line in _lines(log) if line.startswith(WARNING))
    print(*warnings, sep="\n", end="\n" if warnings else "", file=sys.stderr)
    for log in logs:
        log.unlink()


def _command(args: Namespace) -> list[str]:
    command = [sys.executable, "-c", MAIN, "sequence", args.stream, f"--output={args.output}", "--resume"]
    for name in OPTIONS:
        if (value := getattr(args, name)) is not None:
            text = ",".join(value) if isinstance(value, list) else str(value)
            command.append(f"--{name.replace('_', '-')}={text}")
    return command + ["--debug"] * args.debug


def _share(number: int, count: int) -> dict[str, str]:
    """Environment variables that give a process its part of the threads, and one of several CUDA devices."""
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    if (devices := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        share["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % devices]
    return share


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """SIGTERM raises ``SystemExit``, so that the processes end with this one."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(child: subprocess.Popen) -> None:
    child.terminate()
    child.wait()


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()
