"""Runs a stream: every method, learning rate, seed and order, each in a folder of its own that can be resumed.

A run's folder holds ``ledger.json`` (a line for each finished task), ``state.pt`` (the model and the method between
tasks), ``tasks/`` (each task's delta) and, at the end, ``run.json``. A task that was interrupted starts anew, or goes
on from its newest checkpoint; both give the bits of a run that was not.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from ..training.base import this_process
from ..training.checkpoints import last_complete_checkpoint
from ..training.evaluation import written_answers
from .general import GeneralAbility, general_change
from .measures import Measures
from .methods import Method, make_method
from .metrics import load_metric
from .report import write_whole
from .stream import Method as MethodSettings
from .stream import Order, Stream, StreamError, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One way through a stream."""

    method: MethodSettings
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
) -> Iterator[dict]:
    """Run what is not finished yet, and yield the result of every run.

    Args:
        output: gets a folder for each run.
        resume: go on in a folder that has runs.
        checkpoint_steps: steps between checkpoints within a task; None starts an interrupted task anew.

    Raises:
        StreamError: the folder has runs and ``resume`` is False, or they are of another stream (says what differs);
            the model is quantized; a method or an option is unknown.
    """
    if stream.model.quantization is not None:
        raise StreamError("sequences run on dense models: a run is resumed from the weights that its methods changed")
    for method in stream.methods:
        _made(method)  # an unknown option should be known now, not after hours
    _claim(stream, output, resume)
    tokenizer = stream.model.load_tokenizer()
    for run in runs_of(stream):
        yield _Runner(stream, run, output / "runs" / run.name, tokenizer, checkpoint_steps).result()


def _made(method: MethodSettings) -> Method:
    try:
        return make_method(method.name, **method.settings)
    except (ValueError, TypeError) as error:
        raise StreamError(f"methods: {method.label}: {error}") from error


def _claim(stream: Stream, output: Path, resume: bool) -> None:
    """Write down whose runs are in the folder, or check it."""
    file = output / "stream.json"
    if file.exists():
        if not resume:
            raise StreamError(f"{output} has runs already; go on with --resume, or name another folder")
        if difference := stream.difference(json.loads(file.read_text())):
            raise StreamError(f"the runs in {output} are of another stream: {'; '.join(difference[:3])}")
    else:
        output.mkdir(parents=True, exist_ok=True)
        _write_json(file, stream.fingerprint())


class _Runner:
    """One run in one folder."""

    def __init__(self, stream: Stream, run: Run, folder: Path, tokenizer: PreTrainedTokenizerBase, checkpoint_steps):
        self.stream, self.run, self.folder, self.tokenizer = stream, run, folder, tokenizer
        self.checkpoint_steps = checkpoint_steps
        self.tasks = run.order.tasks
        self.tests = [task.examples("test", tokenizer) for task in self.tasks]
        self.metrics = [load_metric(task.metric) for task in self.tasks]
        self.ability = GeneralAbility(stream.general, tokenizer, stream.training.batch_size)

    def result(self) -> dict[str, Any]:
        """What came of it; computed now, or read if it is there."""
        file = self.folder / "run.json"
        if not file.exists():
            logger.info("run %s", self.run.name)
            result = self._computed()
            _write_json(file, result)
            (self.folder / "state.pt").unlink(missing_ok=True)
        return json.loads(file.read_text())

    def _computed(self) -> dict[str, Any]:
        method = _made(self.run.method)
        torch.manual_seed(self.run.seed)
        model = method.prepare(self.stream.model.load(), self.run.seed)
        ledger = self._taken_up(model, method)
        if not ledger:
            ledger = [{"task": None, **self._evaluated(model, range(len(self.tasks)))}]
        lessons = self._lessons(method)
        for number in range(len(ledger) - 1, len(lessons)):
            model, entry = self._learned(model, method, number, lessons[number])
            last = number == len(lessons) - 1
            # the task that comes next is asked too, for the forward transfer
            asked = range(len(self.tasks)) if last else range(min(number + 2, len(self.tasks)))
            ledger.append({**entry, **self._evaluated(model, asked, between_tasks=not last)})
            self._keep(model, method, ledger)
        return self._summed_up(method, ledger)

    def _lessons(self, method: Method) -> list[tuple[str, list[Task]]]:
        """What is learned at a time: one task, or all of them together."""
        if method.sees_all_tasks:
            return [("all", list(self.tasks))]
        return [(task.name, [task]) for task in self.tasks]

    def _learned(self, model: nn.Module, method: Method, number: int, lesson) -> tuple[nn.Module, dict[str, Any]]:
        name, tasks = lesson
        folder = self.folder / "tasks" / f"{number}-{name}"
        parts = [task.examples("train", self.tokenizer, self.run.seed) for task in tasks]
        examples: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        model = method.begin_task(model, number, examples)
        entry: dict[str, Any] = {"task": name, "seconds": 0.0, "selection_seconds": 0.0, "parameters": 0, "bytes": 0}
        trainer = None
        if method.trains:
            arguments = self._arguments(tasks, method, number, folder)
            collator = DataCollatorForSeq2Seq(self.tokenizer)
            trainer = method.trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=_newest(folder / "checkpoints"))
            report = getattr(trainer, "selection_report", None)
            entry["selection_seconds"] = report.seconds if report is not None else 0.0
            entry["seconds"] = time.perf_counter() - start - entry["selection_seconds"]
            trained: Any = trainer.model
            entry["parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        folder.mkdir(parents=True, exist_ok=True)
        model = method.end_task(model, number, trainer, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        entry["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return model, entry

    def _arguments(self, tasks: list[Task], method: Method, number: int, folder: Path) -> TrainingArguments:
        """The same for every method; the seed, and with it the order of the data, differs from task to task."""
        training = replace(self.stream.training_of(tasks[0]), learning_rate=self.run.learning_rate)
        return TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            seed=method.task_seed(number),
            save_strategy="no" if self.checkpoint_steps is None else "steps",
            save_steps=self.checkpoint_steps or 500,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not logger.isEnabledFor(logging.INFO),
            use_cpu=this_process().device.type == "cpu",
        )

    def _evaluated(self, model: nn.Module, tasks: range, between_tasks: bool = False) -> dict[str, Any]:
        """Scores on tasks (by position), and general ability; nothing that training could notice."""
        start = time.perf_counter()
        training = model.training
        with torch.random.fork_rng():
            scores = {self.tasks[position].name: self._score(model, position) for position in tasks}
            general = self.ability.measure(model, between_tasks)
        model.train(training)
        return {"scores": scores, "general": general, "evaluation_seconds": time.perf_counter() - start}

    def _score(self, model: nn.Module, position: int) -> float:
        task, examples, metric = self.tasks[position], self.tests[position], self.metrics[position]
        written = written_answers(
            model, examples, self.stream.training.batch_size, task.max_answer_length, f"Asking {task.name}"
        )
        columns = {"predictions": written, "references": list(examples.references)}
        if "sources" in metric.features:
            columns["sources"] = list(examples.sources)
        result = metric.compute(**columns)
        if task.metric in result:
            return float(result[task.metric])
        return float(next(value for value in result.values() if isinstance(value, (int, float))))

    # Between tasks -------------------------------------------------------------------------------

    def _keep(self, model: nn.Module, method: Method, ledger: list[dict[str, Any]]) -> None:
        """The state first, with how far it goes: a kill between the two files leaves both readable."""
        state = {"model": model.state_dict(), "method": method.state_dict(), "ledger": json.dumps(ledger)}
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.folder / "state.pt")
        _write_json(self.folder / "ledger.json", ledger)

    def _taken_up(self, model: nn.Module, method: Method) -> list[dict[str, Any]]:
        file = self.folder / "state.pt"
        if not file.exists():
            return []
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        method.load_state_dict(state["method"])
        return json.loads(state["ledger"])

    def _summed_up(self, method: Method, ledger: list[dict[str, Any]]) -> dict[str, Any]:
        names = [task.name for task in self.tasks]
        before, *after = ledger
        rows = [[entry["scores"].get(name) for name in names] for entry in after]
        if method.sees_all_tasks:  # it learned all at once: there is no order in which it could forget
            measures: dict[str, Any] = dict.fromkeys(("op_mean", "diagonal", "bwt", "forgetting", "fwt"))
            measures["op"] = sum(rows[-1]) / len(names)
        else:
            found = Measures.of([[math.nan if s is None else s for s in row] for row in rows], before_of(before, names))
            measures = {
                "op": found.final_op,
                "op_mean": found.mean_op,
                "diagonal": found.diagonal_mean,
                "bwt": found.backward_transfer,
                "forgetting": found.forgetting,
                "fwt": found.forward_transfer,
            }
        return {
            "method": self.run.method.name,
            "label": self.run.method.label,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "order": self.run.order.name,
            "tasks": names,
            "R": rows,
            "zero_shot": before_of(before, names),
            **measures,
            "general": general_change([entry["general"] for entry in ledger]),
            "cost": {
                name: sum(entry.get(key, 0) for entry in ledger)
                for name, key in {
                    "selection_seconds": "selection_seconds",
                    "training_seconds": "seconds",
                    "evaluation_seconds": "evaluation_seconds",
                    "bytes": "bytes",
                }.items()
            }
            | {"parameters": max(entry.get("parameters", 0) for entry in ledger)},
        }


def before_of(entry: dict[str, Any], names: list[str]) -> list[float]:
    """Scores before anything was learned, in the order of ``names``."""
    return [entry["scores"][name] for name in names]


def _newest(checkpoints: Path) -> str | None:
    """The newest whole checkpoint of a task that was interrupted."""
    try:
        return str(last_complete_checkpoint(checkpoints))
    except ValueError:
        return None


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, json.dumps(value, indent=1))
