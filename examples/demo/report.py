"""The tables on the terminal and ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from learning import Course, Run
from measures import MEASURES, general_changes, score_matrix
from rich.console import Console
from rich.table import Table


def print_tables(console: Console, runs: list[Run], course: Course) -> None:
    """Print the scores after every task, then the measures and costs side by side."""
    console.print(_score_table(runs, course))
    console.print(_measure_table(runs))


def _score_table(runs: list[Run], course: Course) -> Table:
    names = [task.name for task in course.tasks]
    table = Table(title="Score of each task after each task (the task just learned in bold)")
    table.add_column("method", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for task in course.tasks:
        table.add_column(f"{task.name}\n{task.metric}", justify="right")
    table.add_column("general text\nloss, change", justify="right")
    table.add_row("", "base", *_scores(runs[0], 0), "", end_section=True)
    for run in runs:
        for point, name in enumerate(names, start=1):
            label = run.label if point == 1 else ""
            change = f"{general_changes(run)[point]:+.3f}"
            is_last = point == len(names)
            table.add_row(label, name, *_scores(run, point), change, end_section=is_last)
    return table


def _scores(run: Run, point: int) -> list[str]:
    shown = [f"{score:.3f}" for score in score_matrix(run)[point]]
    if point:
        shown[point - 1] = f"[bold]{shown[point - 1]}[/bold]"
    return shown


def _measure_table(runs: list[Run]) -> Table:
    table = Table(title="The methods beside one another")
    table.add_column("")
    for run in runs:
        table.add_column(f"{run.label}\nrate {run.learning_rate:g}", justify="right")
    for measure in MEASURES:
        arrow = "↑" if measure.higher_is_better else "↓"
        table.add_row(f"{measure.title} {arrow}", *map(measure.show, runs))
    table.add_section()
    for title, show in COSTS.items():
        table.add_row(title, *map(show, runs))
    table.caption = (
        "↑ higher is better, ↓ lower is better; 'since then': the tasks before the last, at the "
        "end of the sequence against just after they were learned"
    )
    return table


def _mean_or_dash(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):{form}}" if known else "-"


COSTS: dict[str, Callable[[Run], str]] = {
    "trained parameters": lambda run: f"{run.trainable_parameters / 1e6:.2f} M",
    "size of one task on disk": lambda run: f"{max(run.file_bytes) / 2**20:.0f} MiB",
    "selection, all tasks": lambda run: f"{sum(s.seconds for s in run.selections):.0f} s",
    "samples it looked at, mean a task": lambda run: _mean_or_dash(
        [selection.samples for selection in run.selections], ".0f"
    ),
    "agreement of their halves, mean": lambda run: _mean_or_dash(
        [selection.agreement for selection in run.selections], ".2f"
    ),
    "training, all tasks": lambda run: f"{sum(run.training_seconds):.0f} s",
    "peak memory of the process": lambda run: f"{run.peak_memory_bytes / 2**30:.2f} GiB",
}


def write_results(path: Path, runs: list[Run], settings: dict[str, object], reading: str) -> None:
    """Write settings, measures, matrices and every per-example figure as JSON."""
    content = {
        "settings": settings,
        "reading": reading,
        "methods": {
            run.method: {
                "measures": {measure.name: asdict(measure.of(run)) for measure in MEASURES},
                "score_matrix": score_matrix(run).tolist(),
                "general_changes": general_changes(run).tolist(),
                "run": asdict(run),
            }
            for run in runs
        },
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
