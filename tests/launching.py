"""Programs that tests start in processes of their own, and launchers that start two processes of a program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import psutil
import pytest

# the name of this host may not resolve everywhere, so the processes meet at a number
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]


def start(*arguments: object, **options: Any) -> subprocess.Popen:
    """Start Python with these arguments; its output and its errors are one text."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **options)


def output_of(process: subprocess.Popen, seconds: float = 300) -> str:
    """What a program printed until it ended without an error. A program that hangs prints where, and is killed."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process, signal.SIGABRT)
        output, errors = process.communicate()
        pytest.fail(f"{process.args} did not end within {seconds} s\n{(errors or output)[-20000:]}")
    assert process.returncode == 0, (errors or output)[-3000:]
    return output


def end(process: subprocess.Popen, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a program and to all that it started: the processes of a launcher outlive it."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(number)
    psutil.wait_procs(family[:-1], timeout=30)
    process.wait(30)
