"""Two worker processes connected by gloo; tests reuse them, because starting them takes seconds."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

SIZE = 2
TIME_LIMIT = 240  # seconds that one call may take before the processes are killed


class Processes:
    """Calls a function of a test module on two ranks at once.

    Each rank calls ``function(*arguments)``; results come back in the order of ranks.
    """

    def __init__(self) -> None:
        self.workers: list[Any] = []
        self.pipes: list[Any] = []

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        results = self.outcomes(function, *arguments)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank}:\n{result.text}"
        return results

    def outcomes(self, function: Callable, *arguments: Any) -> list[Any]:
        """Like a call, but returns a ``Failure`` for each rank on which the function raised."""
        if not self.workers:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIME_LIMIT):
                self.stop()
                others = "".join(f"\nanother rank:\n{r.text}" for r in results if isinstance(r, Failure))
                raise TimeoutError(f"rank {rank} of {function.__name__} did not answer within {TIME_LIMIT} s{others}")
            try:
                results.append(pipe.recv())
            except EOFError as died:
                results.append(Failure(died))
        if any(not worker.is_alive() for worker in self.workers):
            self.stop()  # the next call starts new ones
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(SIZE):
            pipe, worker_pipe = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, port, worker_pipe), daemon=True)
            worker.start()
            self.workers.append(worker)
            self.pipes.append(pipe)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.workers, self.pipes = [], []


class Failure:
    """An exception that a function raised: name of its type, message and traceback."""

    def __init__(self, error: BaseException):
        self.type, self.message, self.text = type(error).__name__, str(error), traceback.format_exc()


def _serve(rank: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.distributed.init_process_group("gloo")
    while True:
        function, arguments = pipe.recv()
        torch.manual_seed(0)
        try:
            pipe.send(function(*arguments))
        except BaseException as error:
            pipe.send(Failure(error))
        _reset_accelerate()


def _reset_accelerate() -> None:
    """Reset accelerate's process-wide state; the next trainer may need different settings."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
