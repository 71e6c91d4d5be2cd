"""A table in the terminal that fills as the results of a stream arrive."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .measures import signed
from .runner import SECONDS

if TYPE_CHECKING:
    from rich.table import Table

    from .run import Run


class LiveTable:
    """The scores of all runs of an output folder, those of other processes too: methods are rows, tasks are columns.

    A cell has the score after the task was learned and, later, the score now. The table is a context manager, and is
    shown only in a terminal.

    Args:
        transient: remove the table at the end.
    """

    def __init__(self, runs: Sequence[Run], output: Path, transient: bool = False):
        self.runs, self.output, self.transient = runs, output, transient
        self._exit = ExitStack()

    def __enter__(self) -> LiveTable:
        from rich.console import Console
        from rich.live import Live

        if sys.stderr.isatty():
            # rich calls the function once per second in a thread of its own
            console = Console(stderr=True)
            live = Live(get_renderable=self.table, console=console, refresh_per_second=1, transient=self.transient)
            self._exit.enter_context(live)
            if logging.is_progress_bar_enabled():  # "Loading weights" would be written into the table
                self._exit.callback(logging.enable_progress_bar)
                logging.disable_progress_bar()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def table(self) -> Table:
        from rich.table import Table
        from rich.text import Text  # in a str, rich would read [names] as markup

        entries = [self._entries(run) for run in self.runs]
        tasks = list(dict.fromkeys(task.name for run in self.runs for task in run.order.tasks))
        table = Table(caption=self._remaining(entries))
        for heading in ("method", *tasks, "general text"):
            table.add_column(Text(heading), justify="left" if heading == "method" else "right")
        for run, own in zip(self.runs, entries, strict=True):
            table.add_row(Text(self._name(run)), *(_score(own, task) for task in tasks), _change(own))
        return table

    def _entries(self, run: Run) -> list[dict[str, Any]]:
        """The base model's evaluation, and one entry for each finished task."""
        file = run.folder(self.output) / "tasks.json"
        return json.loads(file.read_text()) if file.exists() else []

    def _name(self, run: Run) -> str:
        """The label, and what else distinguishes the run from others."""
        several = {
            f"rate {run.learning_rate:g}": len({(r.method.label, r.learning_rate) for r in self.runs})
            > len({r.method.label for r in self.runs}),
            f"seed {run.seed}": len({r.seed for r in self.runs}) > 1,
            run.order.name: len({r.order.name for r in self.runs}) > 1,
        }
        return ", ".join((run.method.label, *(text for text, shown in several.items() if shown)))

    def _remaining(self, entries: Sequence[list[dict[str, Any]]]) -> str:
        """The time for the remaining tasks, from that of the finished ones."""
        total = sum(len(run.order.tasks) for run in self.runs)
        finished = [_finished(run, own) for run, own in zip(self.runs, entries, strict=True)]
        left, done = total - sum(finished), sum(finished)
        text = f"{left} task{'' if left == 1 else 's'} left"
        if not done or not left:
            return text
        seconds = sum(entry.get(name) or 0.0 for own in entries for entry in own[1:] for name in SECONDS)
        working = sum(
            own != [] and n < len(run.order.tasks) for run, own, n in zip(self.runs, entries, finished, strict=True)
        )
        minutes = left * seconds / done / max(1, working) / 60
        return f"{text}, about {max(1, round(minutes))} min"


def _finished(run: Run, entries: Sequence[dict[str, Any]]) -> int:
    """The number of finished tasks. A method that sees all tasks at once has one entry for them."""
    return len(run.order.tasks) if entries and entries[-1]["task"] == "all" else max(0, len(entries) - 1)


def _score(entries: Sequence[dict[str, Any]], task: str) -> str:
    """The score after the task was learned, and the score now."""
    position = next((n for n, entry in enumerate(entries[1:]) if entry["task"] in (task, "all")), None)
    if position is None:
        return ""
    learned, now = entries[position + 1]["scores"][task], entries[-1]["scores"][task]
    return f"{learned:.2f}" if position == len(entries) - 2 else f"{learned:.2f} → {now:.2f}"


def _change(entries: Sequence[dict[str, Any]]) -> str:
    """The change of the loss on general text since the base model, in nats."""
    if len(entries) < 2 or entries[0].get("general_loss") is None:
        return ""
    return signed(entries[-1]["general_loss"] - entries[0]["general_loss"])
