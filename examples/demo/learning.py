"""Learn the tasks one after another with one method, and score all of them after each."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil
import torch
from evaluation import Batch, Encoder, ExampleScores, answer_loss, evaluate
from methods import Learner, Method, Selection
from tasks import Example, Task
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_linear_schedule_with_warmup


@dataclass(frozen=True)
class Snapshot:
    """Per-example figures of every task and of the general text at one point of the sequence."""

    scores: list[list[float]]
    """``[task][example]``, by the task's own metric."""
    losses: list[list[float]]
    general: list[float]
    """Mean next-token loss of each paragraph of the general text."""


@dataclass
class Run:
    """Everything that one method did and how it scored; ``snapshots[0]`` is the base model."""

    method: str
    label: str
    learning_rate: float
    snapshots: list[Snapshot]
    selections: list[Selection] = field(default_factory=list)
    training_seconds: list[float] = field(default_factory=list)
    file_bytes: list[int] = field(default_factory=list)
    trainable_parameters: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Course:
    """What is taught and tested: the tasks, the general text and how a task is trained."""

    tasks: list[Task]
    general: list[Example]
    encoder: Encoder
    batch_size: int
    seed: int

    def loader(self, task: Task) -> DataLoader:
        """The training batches of one task, in the same order for every method."""
        return self.encoder.training_loader(task.train, self.batch_size, self.seed)

    def snapshot(self, model: nn.Module) -> Snapshot:
        """Score every task, seen or not, and the general text."""
        results = [evaluate(model, task.test, self.encoder) for task in self.tasks]
        general = evaluate(model, self.general, self.encoder)
        return Snapshot(
            scores=[_by_metric(task, result) for task, result in zip(self.tasks, results, strict=True)],
            losses=[result.loss for result in results],
            general=general.loss,
        )


def _by_metric(task: Task, result: ExampleScores) -> list[float]:
    return result.exact_match if task.metric == "exact match" else result.token_accuracy


def delta_folder(output: Path, position: int, task: Task) -> Path:
    """Where the adapter of one task lies, e.g. ``OUTPUT/deltas/1-module``."""
    return output / "deltas" / f"{position}-{task.name}"


def learn_sequence(
    base: PreTrainedModel, method: Method, course: Course, start: Snapshot, output: Path
) -> tuple[Run, nn.Module]:
    """Learn all tasks; return the record of it and the final model."""
    torch.manual_seed(course.seed)
    run = Run(method.name, method.label, method.learning_rate, snapshots=[start])
    with PeakMemory() as memory:
        learner = method.learner(base)
        for position, task in enumerate(course.tasks, start=1):
            loader = course.loader(task)
            run.selections.append(learner.begin_task(loader))
            with tqdm(total=len(loader), desc=f"  {position} {task.name}", unit="step") as bar:
                started = time.perf_counter()
                train(learner, loader, method.learning_rate, bar)
                run.training_seconds.append(time.perf_counter() - started)
                run.trainable_parameters = sum(t.numel() for t in learner.trained_tensors())
                gc.collect()  # optimizer and schedule refer to each other: free their memory now
                run.file_bytes.append(learner.end_task(delta_folder(output, position, task)))
                bar.set_postfix_str("scoring all tasks ...")
                run.snapshots.append(course.snapshot(learner.model))
                bar.set_postfix_str(_scores(run.snapshots[-1], course))
    run.peak_memory_bytes = memory.peak_bytes
    return run, learner.model


def _scores(snapshot: Snapshot, course: Course) -> str:
    pairs = zip(course.tasks, snapshot.scores, strict=True)
    return ", ".join(f"{task.name} {fmean(scores):.2f}" for task, scores in pairs)


def train(learner: Learner, loader: DataLoader, learning_rate: float, bar: tqdm) -> None:
    """One pass over the batches: AdamW without decay, a short warm-up, then linear to zero."""
    learner.model.train()
    optimizer = torch.optim.AdamW(learner.trained_tensors(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=min(3, len(loader) // 2), num_training_steps=len(loader)
    )
    for batch in loader:
        bar.set_postfix_str(f"loss {training_step(learner, optimizer, batch):.3f}")
        schedule.step()
        bar.update()


def training_step(learner: Learner, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Forward, backward, update; returns the loss before the update."""
    loss = answer_loss(learner.model, batch)
    loss.backward()
    learner.update(optimizer)
    return loss.item()


class PeakMemory:
    """The largest resident memory of this process while the block runs, sampled ten times a second.

    The kernel's own high-water mark cannot be reset between two methods, hence the thread.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process(os.getpid())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        gc.collect()
        _return_freed_memory()
        self.peak_bytes = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _return_freed_memory() -> None:
    """Give memory that earlier methods freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
