"""One run of a stream in its own folder: it learns task after task, evaluates after each, and can be killed any time.

The folder contains ``tasks.json`` (an entry for each finished task), ``state.pt`` (the model and the method between
tasks), ``tasks/`` (each task's delta) and, at the end, ``run.json``. An interrupted task restarts, or continues from
its newest checkpoint; both give the same bits as a run without interruption (except ``sdft`` from a checkpoint).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PrinterCallback, TrainingArguments

from ..retention import kl_divergence
from ..selection.processes import Processes
from ..training.base_model import this_process
from ..training.checkpoints import last_complete_checkpoint
from ..training.data import TokenizedExamples, padding_on_the_right
from ..training.evaluation import score_answers, written_answers
from ..training.texts import PARAGRAPH_LENGTH, read_paragraphs
from ..tuner.files import digest_of_folder, file_name, partial_file, write_json
from .measures import measures_of
from .memory import peak_memory, reset_peak_memory
from .methods import Method
from .metrics import sample_scores, task_score
from .state import restore_state_, state_of
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .run import Run
    from .stream import Stream

Lesson = tuple[str, Sequence[Task]]  # a name and the tasks that are learned together
Entries = list[dict[str, Any]]
KL_BATCHES = 1  # of test examples
SECONDS = ("selection_seconds", "training_seconds", "evaluation_seconds")
SUMMED = (*SECONDS, "bytes")  # costs of a run that add up


class Runner:
    """One run in one folder.

    Args:
        checkpoint_steps: steps between checkpoints within a task; None restarts an interrupted task.
    """

    def __init__(
        self,
        stream: Stream,
        run: Run,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint_steps: int | None = None,
    ):
        self.stream, self.run, self.folder, self.tokenizer = stream, run, folder, tokenizer
        self.checkpoint_steps = checkpoint_steps
        self.tasks = run.order.tasks
        self.tests = [task.examples("test", tokenizer) for task in self.tasks]
        self.batch_size = stream.training.evaluation_batch_size or stream.training.batch_size
        general = stream.general
        files = {} if general is None else {"general_loss": general.text, "other_loss": general.other}
        self.texts = {
            name: TokenizedExamples(read_paragraphs(file), tokenizer, PARAGRAPH_LENGTH)
            for name, file in files.items()
            if file is not None
        }
        self.processes = Processes()
        reset_peak_memory()

    def result(self) -> dict[str, Any]:
        """The run's result, computed or read from the folder."""
        file = self.folder / "run.json"
        if not self.processes.gather(file.exists())[0]:
            result = self._compute()
            with self._first_process_writes() as writes:
                if writes:
                    write_json(file, result)
                    (self.folder / "state.pt").unlink(missing_ok=True)
        return json.loads(file.read_text())

    @contextmanager
    def _first_process_writes(self) -> Iterator[bool]:
        """Whether this process writes files. All processes leave the context together."""
        with self.processes.together("writing the run's files"):
            yield self.processes.rank == 0

    def _compute(self) -> dict[str, Any]:
        method, model, entries = self._load_state()
        lessons: list[Lesson] = [(task.name, (task,)) for task in self.tasks]
        if method.sees_all_tasks:
            lessons = [("all", self.tasks)]
        while len(entries) <= len(lessons) and not is_stopped(entries):
            number = len(entries) - 1
            method, model, entry = self._learn(method, model, number, lessons, entries)
            entry |= {"kept_bytes": size_of(method.memory), "peak_memory": peak_memory()}  # of this process
            entries.append(entry)
            self._save_state(model, method, entries)
        return self._result(entries, method.sees_all_tasks)

    def _learn(
        self, method: Method, model: nn.Module, number: int, lessons: list[Lesson], entries: Entries
    ) -> tuple[Method, nn.Module, dict[str, Any]]:
        """Train, evaluate and apply the gate; the entry describes the model after the gate."""
        name, tasks = lessons[number]
        # for the forward transfer also the next task
        count = len(self.tasks) if number == len(lessons) - 1 else number + 2
        gate = self.stream.gate
        model, entry = self._train(model, method, number, name, tasks)
        entry |= self._measure(model, count, number + 1)
        violations = [] if gate is None else gate.violations(learned(entries), entry["scores"])
        if gate is not None and violations:
            if gate.action == "rollback":
                method, model, _ = self._load_state()
                entry |= {"parameters": 0, "bytes": 0, "digest": None, **self._measure(model, count, number + 1)}
            action = {"stop": "stopped", "rollback": "rolled back"}[gate.action]
            entry["gate"] = [{"task": name, **violation, "action": action} for violation in violations]
        return method, model, entry

    def _train(
        self, model: nn.Module, method: Method, number: int, name: str, tasks: Sequence[Task]
    ) -> tuple[nn.Module, dict[str, Any]]:
        folder = self.folder / "tasks" / f"{number}-{file_name(name)}"
        parts = [task.examples("train", self.tokenizer, self.run.seed) for task in tasks]
        examples: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
        entry: dict[str, Any] = {"task": name, "parameters": 0, "steps": 0, "examples": 0}
        trainer: Any = None
        method.number = number
        model = method.begin_task(model, examples)
        if method.trains:
            start = time.perf_counter()
            trainer = method.trainer(
                model=model,
                args=self._arguments(tasks[0], method.task_seed, folder / "checkpoints"),
                train_dataset=examples,
                data_collator=padding_on_the_right(self.tokenizer),
            )
            trainer.remove_callback(PrinterCallback)  # it prints dicts
            trainer.train(resume_from_checkpoint=_newest_checkpoint(folder / "checkpoints"))
            report = getattr(trainer, "selection_report", None)
            selection_seconds = 0.0 if report is None else report.seconds
            entry |= {
                "selection_seconds": selection_seconds,
                "training_seconds": time.perf_counter() - start - selection_seconds,
                "steps": trainer.state.global_step,
                "examples": len(trainer.train_dataset),
                "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            }
        with self._first_process_writes() as writes:
            if writes:
                shutil.rmtree(folder, ignore_errors=True)  # files of an interrupted attempt, and the checkpoints
                folder.mkdir(parents=True)
        model = method.end_task(model, trainer, folder)
        if self.processes.size > 1:  # the first process has written the files when they are compared
            sums = {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}
            self.processes.require_same(f"the weights after the task {name!r}", sums, "The method needs one process.")
        files = [file for file in folder.rglob("*") if file.is_file()]
        entry["bytes"] = sum(file.stat().st_size for file in files)
        entry["digest"] = digest_of_folder(folder) if files else None
        return model, entry

    def _arguments(self, task: Task, seed: int, folder: Path) -> TrainingArguments:
        """The same for every method; the seed, and thus the order of the data, differs from task to task."""
        training = self.stream.training_of(task)
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=training.epochs,
            max_steps=training.max_steps or -1,
            per_device_train_batch_size=training.batch_size // self.processes.size,
            gradient_accumulation_steps=training.gradient_accumulation,
            learning_rate=self.run.learning_rate,
            lr_scheduler_type=training.schedule,
            warmup_steps=training.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            bf16=training.bf16,
            seed=seed,
            save_strategy="no" if self.checkpoint_steps is None else "steps",
            save_steps=self.checkpoint_steps or 500,
            save_total_limit=1,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=this_process().device.type == "cpu",
        )

    def _measure(self, model: nn.Module, count: int, learned: int) -> dict[str, Any]:
        return {**self._evaluate(model, count), "kl": self._kl(model, learned)}

    def _evaluate(self, model: nn.Module, count: int) -> dict[str, Any]:
        """Scores on the first ``count`` tasks, and the losses on general text. Training is not affected.

        ``right`` has a digit for each test example: 1 if the model writes exactly the answer.
        """
        start = time.perf_counter()
        training, scores, right = model.training, {}, {}
        with torch.random.fork_rng(), self._autocast():
            for task, examples in list(zip(self.tasks, self.tests, strict=True))[:count]:
                title = f"Evaluating {task.name}"
                length = task.max_answer_length
                answers = written_answers(model, examples, self.batch_size, length, title, self.processes)
                scores[task.name] = task_score(task.metric, answers, examples.references, examples.sources)
                exact = sample_scores("exact_match", answers, examples.references, examples.sources)
                right[task.name] = "".join(f"{score:.0f}" for score in exact)
            losses = {
                name: score_answers(model, text, self.batch_size, "General text", self.processes).loss
                for name, text in self.texts.items()
            }
        model.train(training)
        seconds = time.perf_counter() - start
        return {"scores": scores, "right": right, "general_loss": None, **losses, "evaluation_seconds": seconds}

    def _evaluate_base(self, model: nn.Module) -> dict[str, Any]:
        """The base model's evaluation on all tasks, which the runs of an output folder share."""
        file = self.folder.parents[2] / "base.json"
        if not self.processes.gather(file.exists())[0]:
            entry = {"task": None, **self._evaluate(model, len(self.tasks))}
            with self._first_process_writes() as writes:
                if writes:
                    write_json(file, entry)
        return json.loads(file.read_text())

    def _kl(self, model: nn.Module, count: int) -> float | None:
        """``KL(base || model)`` on some test examples of the newest of ``count`` tasks; None if not requested."""
        if self.stream.general is None or not self.stream.general.kl:
            return None
        base, examples = self.stream.model.load(), self.tests[count - 1]
        batches = DataLoader(examples, self.batch_size, collate_fn=padding_on_the_right(self.tokenizer))
        with self._autocast():
            return kl_divergence(model, batches, num_batches=KL_BATCHES, base=base)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(this_process().device.type, torch.bfloat16, enabled=self.stream.training.bf16)

    def _save_state(self, model: nn.Module, method: Method, entries: Entries) -> None:
        """Save the state, which contains the entries, before ``tasks.json``: a kill between them is harmless."""
        state = {"model": state_of(model), "method": method.memory, "entries": json.dumps(entries)}
        with self._first_process_writes() as writes:
            if writes:
                with partial_file(self.folder / "state.pt") as partial:
                    torch.save(state, partial)
                write_json(self.folder / "tasks.json", entries)

    def _load_state(self) -> tuple[Method, nn.Module, Entries]:
        """Method, model and entries after the last finished task."""
        method = self.run.method.method()
        torch.manual_seed(self.run.seed)
        base, file = self.stream.model.load(), self.folder / "state.pt"
        entries = [] if file.exists() else [self._evaluate_base(base)]
        model = method.prepare(base, self.run.seed)
        if entries:
            return method, model, entries
        state = torch.load(file, map_location="cpu", weights_only=True)
        restore_state_(model, state["model"])
        method.memory = state["method"]
        return method, model, json.loads(state["entries"])

    def _result(self, entries: Entries, sees_all_tasks: bool) -> dict[str, Any]:
        """The result as plain types: one entry of a report."""
        before, *after = entries
        # fewer tasks if a gate has stopped the run
        tasks = [task.name for task in (self.tasks if sees_all_tasks else self.tasks[: len(after)])]
        rows = [[entry["scores"].get(name) for name in tasks] for entry in after]
        zero_shot = [before["scores"][name] for name in tasks]
        losses, others, divergences = (
            [entry[name] for entry in entries if entry.get(name) is not None]
            for name in ("general_loss", "other_loss", "kl")
        )
        return {
            "method": self.run.method.name,
            "label": self.run.method.label,
            "learning_rate": self.run.learning_rate,
            "seed": self.run.seed,
            "order": self.run.order.name,
            "tasks": tasks,
            "task_count": len(self.tasks),
            "R": rows,
            "zero_shot": zero_shot,
            "general_losses": losses or None,
            "other_losses": others or None,
            "divergences": divergences or None,
            "changed": changed_answers(after) or None,
            **measures_of(rows, zero_shot, losses, others, divergences),
            "gate": [event for entry in after for event in entry.get("gate", [])] or None,
            "cost": {
                **{name: sum(entry.get(name, 0) for entry in entries) for name in SUMMED},
                "parameters": max(entry.get("parameters", 0) for entry in entries),
                "kept_bytes": max(entry.get("kept_bytes", 0) for entry in entries),
                "peak_memory": max(entry.get("peak_memory") or 0 for entry in entries) or None,
            },
        }


def learned(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Finished task -> its score right after it was learned."""
    return {entry["task"]: entry["scores"][entry["task"]] for entry in entries if entry["task"] in entry["scores"]}


def size_of(memory: dict[Any, Any]) -> int:
    """Bytes of the tensors in what a method keeps between tasks, and of its other values as text."""
    return sum(leaf.nbytes if isinstance(leaf, torch.Tensor) else len(str(leaf)) for leaf in tree_leaves(memory))


def changed_answers(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Task -> how many of its test answers became wrong ("lost") and right ("gained") after it was learned."""
    changed = {}
    for entry in entries[:-1]:
        pairs = list(zip(entry["right"][entry["task"]], entries[-1]["right"][entry["task"]], strict=True))
        changed[entry["task"]] = {"lost": pairs.count(("1", "0")), "gained": pairs.count(("0", "1"))}
    return changed


def is_stopped(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether a gate has ended the run."""
    return any(event["action"] == "stopped" for event in entries[-1].get("gate", []))


def _newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of an interrupted task."""
    try:
        return str(last_complete_checkpoint(folder))
    except ValueError:
        return None
