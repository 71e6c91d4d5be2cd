"""One run of a stream in a folder of its own: learns task after task, asks after each, and can be killed at any moment.

The folder holds ``tasks.json`` (an entry for each finished task), ``state.pt`` (the model and the method between
tasks), ``tasks/`` (each task's delta) and, at the end, ``run.json``. A task that was interrupted starts anew, or goes
on from its newest checkpoint; both give the bits of a run that was not.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import ConcatDataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from ..deltas.overlaps import support_overlap
from ..training.base_model import this_process
from ..training.checkpoints import last_complete_checkpoint
from ..training.evaluation import written_answers
from ..tuner.files.atomic import digest_of_folder, write_json
from .general import GeneralAbility
from .memory import MemoryLog, PeakMemory, TrainingBegins, return_freed_memory
from .methods import Method, make_method
from .metrics import load_metric
from .result import result_of
from .stream import Method as MethodSettings
from .stream import StreamError, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .run import Run
    from .stream import Stream

logger = logging.getLogger(__name__)
Lesson = tuple[str, list[Task]]
Ledger = list[dict[str, Any]]
SELECTION = ("num_samples", "samples", "agreement", "reference_samples", "reference_seconds", "sample_passes")
"""What the ledger has of a selection, by its names in the report; its seconds are ``selection_seconds``."""


def method_of(settings: MethodSettings) -> Method:
    """The method that a stream describes.

    Raises:
        StreamError: the method is unknown or an option is illegal.
    """
    try:
        return make_method(settings.name, **settings.settings)
    except (ValueError, TypeError) as error:
        raise StreamError(f"methods: {settings.label}: {error}") from error


class Runner:
    """One run in one folder.

    Args:
        checkpoint_steps: steps between checkpoints within a task; None restarts an interrupted task.
        on_tasks_done: called with a number of finished tasks, for a progress display.
    """

    def __init__(
        self,
        stream: Stream,
        run: Run,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint_steps: int | None = None,
        on_tasks_done: Callable[[int], Any] = lambda count: None,
    ):
        self.stream, self.run, self.folder, self.tokenizer = stream, run, folder, tokenizer
        self.checkpoint_steps, self.on_tasks_done = checkpoint_steps, on_tasks_done
        self.tasks = run.order.tasks
        self.tests = [task.examples("test", tokenizer) for task in self.tasks]
        self.metrics = [load_metric(task.metric) for task in self.tasks]
        self.ability = GeneralAbility(stream.general, tokenizer, self._batch_size)
        return_freed_memory()
        self.memory = PeakMemory()

    def result(self) -> dict[str, Any]:
        """What came of it; computed now, or read if it is there."""
        file = self.folder / "run.json"
        if not file.exists():
            logger.info("run %s", self.run.name)
            write_json(file, self._computed())
            (self.folder / "state.pt").unlink(missing_ok=True)
        return json.loads(file.read_text())

    def _computed(self) -> dict[str, Any]:
        method, model, ledger = self._taken_up()
        if not ledger:
            ledger = [{"task": None, **self._evaluated(model, range(len(self.tasks)))}]
        self.on_tasks_done(len(ledger) - 1)
        lessons = self._lessons(method)
        while len(ledger) <= len(lessons) and not is_stopped(ledger):
            method, model, entry = self._learned(method, model, lessons, ledger)
            ledger.append(entry)
            self._keep(model, method, ledger)
            self.on_tasks_done(len(lessons[len(ledger) - 2][1]))
        folders = [self._task_folder(number, name) for number, (name, _) in enumerate(lessons[: len(ledger) - 1])]
        overlap = support_overlap(folders)
        return result_of(self.run, ledger, method.sees_all_tasks, self._cut(), overlap)

    def _lessons(self, method: Method) -> list[Lesson]:
        """What is learned at a time: one task, or all of them together."""
        if method.sees_all_tasks:
            return [("all", list(self.tasks))]
        return [(task.name, [task]) for task in self.tasks]

    def _learned(
        self, method: Method, model: nn.Module, lessons: list[Lesson], ledger: Ledger
    ) -> tuple[Method, nn.Module, dict[str, Any]]:
        """The next entry of the ledger: of the lesson as it was learned, or as the gate left it."""
        gate, number = self.stream.gate, len(ledger) - 1
        is_last = number == len(lessons) - 1
        model, entry = self._trained(model, method, number, lessons[number])
        entry |= self._asked(model, number, is_last)
        violations = [] if gate is None else gate.violations(learned(ledger), entry["scores"])
        if gate is not None and violations:
            if gate.action == "rollback":
                method, model, _ = self._taken_up()
                entry = nothing_learned(entry) | self._asked(model, number, is_last)
            action = {"stop": "stopped", "rollback": "rolled back"}[gate.action]
            entry["gate"] = [{"task": lessons[number][0], **each, "action": action} for each in violations]
        return method, model, entry

    def _asked(self, model: nn.Module, number: int, is_last: bool) -> dict[str, Any]:
        """What is found after lesson ``number``: on the tasks seen, and for the forward transfer on the next."""
        count = len(self.tasks) if is_last else number + 2
        return self._evaluated(model, range(count), between_tasks=not is_last)

    def _trained(
        self, model: nn.Module, method: Method, number: int, lesson: Lesson
    ) -> tuple[nn.Module, dict[str, Any]]:
        name, tasks = lesson
        folder = self._task_folder(number, name)
        checkpoints = folder / "checkpoints"
        parts = [task.examples("train", self.tokenizer, self.run.seed) for task in tasks]
        examples: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        entry: dict[str, Any] = {"task": name, "seconds": 0.0, "selection_seconds": 0.0, "parameters": 0, "bytes": 0}
        entry |= {"steps": 0, "examples": 0}
        trainer = None
        with self.memory.phase("selection"):
            model = method.begin_task(model, number, examples)
            if method.trains:
                arguments = self._arguments(tasks, method, number, checkpoints)
                collator = DataCollatorForSeq2Seq(self.tokenizer)
                start, memory_log = time.perf_counter(), MemoryLog()
                trainer = method.trainer(
                    model=model,
                    args=arguments,
                    train_dataset=examples,
                    data_collator=collator,
                    callbacks=[TrainingBegins(self.memory), memory_log],
                )
                trainer.train(resume_from_checkpoint=_newest(checkpoints))
                report = getattr(trainer, "selection_report", None)
                entry["selection_seconds"] = report.seconds if report is not None else 0.0
                if report is not None:
                    entry["selection"] = {name: getattr(report, name) for name in SELECTION}
                entry["seconds"] = time.perf_counter() - start - entry["selection_seconds"]
                trained: Any = trainer.model
                entry |= {"steps": trainer.state.global_step, "examples": len(trainer.train_dataset)}  # type: ignore[arg-type]
                entry["accelerator_memory"] = memory_log.figures()
                entry["parameters"] = sum(p.numel() for p in trained.parameters() if p.requires_grad)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt before, and the checkpoints
        folder.mkdir(parents=True)
        model = method.end_task(model, number, trainer, folder)
        files = [file for file in folder.rglob("*") if file.is_file()]
        entry["bytes"] = sum(file.stat().st_size for file in files)
        entry["digest"] = digest_of_folder(folder) if files else None
        return model, entry

    def _task_folder(self, number: int, name: str) -> Path:
        return self.folder / "tasks" / f"{number}-{name}"

    def _arguments(self, tasks: list[Task], method: Method, number: int, folder: Path) -> TrainingArguments:
        """The same for every method; the seed, and with it the order of the data, differs from task to task."""
        training = replace(self.stream.training_of(tasks[0]), learning_rate=self.run.learning_rate)
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=bool(training.bf16),
            seed=method.task_seed(number),
            save_strategy="no" if self.checkpoint_steps is None else "steps",
            save_steps=self.checkpoint_steps or 500,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=not logger.isEnabledFor(logging.INFO),
            use_cpu=this_process().device.type == "cpu",
        )

    # Asking ----------------------------------------------------------------------------------------

    def _evaluated(self, model: nn.Module, tasks: range, between_tasks: bool = False) -> dict[str, Any]:
        """Scores on tasks (by position), and general ability; nothing that training could notice."""
        start = time.perf_counter()
        training, device = model.training, this_process().device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=bool(self.stream.training.bf16))
        with self.memory.phase("evaluation"), torch.random.fork_rng(), autocast:
            scores = {self.tasks[position].name: self._score(model, position) for position in tasks}
            general = self.ability.measure(model, between_tasks)
        model.train(training)
        return {"scores": scores, "general": general, "evaluation_seconds": time.perf_counter() - start}

    @property
    def _batch_size(self) -> int:
        return self.stream.training.evaluation_batch_size or self.stream.training.batch_size

    def _score(self, model: nn.Module, position: int) -> float:
        task, examples, metric = self.tasks[position], self.tests[position], self.metrics[position]
        written = written_answers(model, examples, self._batch_size, task.max_answer_length, f"Asking {task.name}")
        columns = {"predictions": written, "references": list(examples.references)}
        if "sources" in metric.features:
            columns["sources"] = list(examples.sources)
        result = metric.compute(**columns)
        if task.metric in result:
            return float(result[task.metric])
        return float(next(value for value in result.values() if isinstance(value, (int, float))))

    def _cut(self) -> dict[str, dict[str, int]]:
        """Task -> how many of its test prompts and answers are longer than its limits, where there are any."""
        counts = {
            task.name: {"prompts": examples.cut_prompts, "answers": examples.cut_answers}
            for task, examples in zip(self.tasks, self.tests, strict=True)
        }
        return {name: count for name, count in counts.items() if any(count.values())}

    # Between tasks ---------------------------------------------------------------------------------

    def _keep(self, model: nn.Module, method: Method, ledger: Ledger) -> None:
        """The state first, with how far it goes: a kill between the two files leaves both readable."""
        ledger[-1]["peak_memory"] = dict(self.memory.peaks)
        state = {"model": model.state_dict(), "method": method.state_dict(), "ledger": json.dumps(ledger)}
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / "state.pt.partial"
        try:
            torch.save(state, partial)
        except BaseException:  # a full disk: what was there before stays, and half a file does not
            partial.unlink(missing_ok=True)
            raise
        partial.replace(self.folder / "state.pt")
        write_json(self.folder / "tasks.json", ledger)

    def _taken_up(self) -> tuple[Method, nn.Module, Ledger]:
        """Method, model and ledger as the last finished task left them."""
        method = method_of(self.run.method)
        torch.manual_seed(self.run.seed)
        model = method.prepare(self.stream.model.load(), self.run.seed)
        file = self.folder / "state.pt"
        if not file.exists():
            return method, model, []
        state = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        method.load_state_dict(state["method"])
        return method, model, json.loads(state["ledger"])


def learned(ledger: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Finished task -> its score right after it was learned."""
    return {entry["task"]: entry["scores"][entry["task"]] for entry in ledger if entry["task"] in entry["scores"]}


def is_stopped(ledger: Sequence[dict[str, Any]]) -> bool:
    """Whether a gate has ended the run."""
    return any(event["action"] == "stopped" for event in ledger[-1].get("gate", []))


def nothing_learned(entry: dict[str, Any]) -> dict[str, Any]:
    """What stays of the entry of a task that was taken out again: what it cost."""
    return entry | {"parameters": 0, "bytes": 0, "digest": None}


def _newest(checkpoints: Path) -> str | None:
    """The newest whole checkpoint of a task that was interrupted."""
    try:
        return str(last_complete_checkpoint(checkpoints))
    except ValueError:
        return None
