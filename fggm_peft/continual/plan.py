"""What a stream will do and about how long it will take, from a short probe of the model on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq

from ..training.base import this_process
from .run import Run, pending_runs, runs_of
from .runner import made
from .stream import Stream, Task, Training
from .task import TaskExamples

PROBED_TOKENS = 4  # written one by one
PROBED_ENTRIES = 4_000_000  # of a weight that an optimizer moves


@dataclass(frozen=True)
class Plan:
    """What is still to do.

    Args:
        runs: of the stream.
        pending: of these, not finished.
        steps: optimizer steps of all pending runs.
        seconds: estimate for one process; what a method adds of its own (a singular value decomposition, say) is not
            in it. Later tasks of the stream are taken for as slow as the probe's was, token by token.
    """

    runs: int
    pending: int
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.pending:
            return f"all {self.runs} runs are finished"
        return f"{self.pending} of {self.runs} runs to do, {self.steps:,} steps, about {duration(self.seconds)}"


def plan_of(stream: Stream, output: Path) -> Plan:
    """The plan of what is not finished in ``output``, after a probe of a few seconds.

    Raises:
        StreamError: as ``run_stream``.
    """
    pending = pending_runs(stream, output)
    if not pending:
        return Plan(len(runs_of(stream)), 0, 0, 0.0)
    tokenizer = stream.model.load_tokenizer()
    splits = {task.name: (task.examples("train", tokenizer), task.examples("test", tokenizer)) for task in stream.tasks}
    speed = _probe(stream, splits[stream.tasks[0].name][0])
    costs = [_run_cost(stream, run, splits, speed) for run in pending]
    return Plan(len(runs_of(stream)), len(pending), sum(c[0] for c in costs), sum(c[1] for c in costs))


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine.

    Args:
        training: a position, forward and backward.
        reading: a position, forward.
        writing: one more token for a whole batch of answers.
        moving: a weight entry, by AdamW.
        entries: of the model.
    """

    training: float
    reading: float
    writing: float
    moving: float
    entries: int


def _probe(stream: Stream, examples: TaskExamples) -> Speed:
    model: Any = stream.model.load()
    device = this_process().device
    training = stream.training
    batch = DataCollatorForSeq2Seq(examples.tokenizer)([examples[0]] * training.batch_size).to(device)
    prompt = {name: batch[name][:, : max(1, batch[name].shape[1] // 2)] for name in ("input_ids", "attention_mask")}
    dense = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for parameter in dense:
        parameter.requires_grad_(stream.model.quantization is None)
    model.get_input_embeddings().weight.requires_grad_(True)

    def train() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def read() -> None:
        model(**batch)

    def write(count: int) -> Callable[[], Any]:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return lambda: model.generate(**prompt, **settings, pad_token_id=examples.tokenizer.pad_token_id)

    positions = batch["input_ids"].numel()
    with torch.autocast(device.type, torch.bfloat16, enabled=bool(training.bf16)):
        forward_backward, forward = _seconds(train), _seconds(read)
        written = (_seconds(write(1 + PROBED_TOKENS)) - _seconds(write(1))) / PROBED_TOKENS
    weight = nn.Parameter(torch.zeros(PROBED_ENTRIES, device=device))
    weight.grad = torch.ones_like(weight)
    moved = _seconds(torch.optim.AdamW([weight]).step) / PROBED_ENTRIES
    entries = sum(parameter.numel() for parameter in dense)
    return Speed(forward_backward / positions, forward / positions, max(written, 0.0), moved, entries)


def _seconds(call: Callable[[], Any]) -> float:
    """Of the second call; the first one warms up."""
    call()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _run_cost(stream: Stream, run: Run, splits: dict[str, tuple[TaskExamples, TaskExamples]], speed: Speed):
    """Steps and seconds of one run."""
    method = made(run.method)
    tasks, training = run.order.tasks, stream.training
    asked = [_asking(task, splits[task.name][1], training, speed) for task in tasks]
    steps, seconds = 0, sum(asked)  # before anything is learned
    sizes = [len(splits[task.name][0]) for task in tasks]
    lengths = [_mean_length(splits[task.name][0]) for task in tasks]
    density = 1.0 if method.density is None else method.density
    for number in range(1 if method.sees_all_tasks else len(tasks)):
        seconds += sum(asked if method.sees_all_tasks else asked[: number + 2])
        counts = method.examples_in(number, sizes)
        if not sum(counts):
            continue
        positions = sum(count * length for count, length in zip(counts, lengths, strict=True))
        of_task = stream.training_of(tasks[number])
        of_epoch = math.ceil(sum(counts) / (training.batch_size * training.gradient_accumulation))
        now = of_task.max_steps or math.ceil(of_epoch * of_task.epochs)
        steps += now
        seconds += positions * now / of_epoch * speed.training + now * density * speed.entries * speed.moving
        if method.density is not None:  # at most one pass over the data, to select
            seconds += positions * speed.training
    return steps, seconds


def _asking(task: Task, examples: TaskExamples, training: Training, speed: Speed) -> float:
    batches = math.ceil(len(examples) / (training.evaluation_batch_size or training.batch_size))
    positions = len(examples) * _mean_length(examples)
    return positions * speed.reading + batches * task.max_answer_length * speed.writing


def _mean_length(examples: TaskExamples) -> float:
    return sum(len(examples[i]["input_ids"]) for i in range(len(examples))) / len(examples)


def duration(seconds: float) -> str:
    """Rounded as far as an estimate is worth: "40 s", "7 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
