"""The result of a run as plain types: one entry of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .measures import Record, measures_of

if TYPE_CHECKING:
    from .run import Run

Entry = Mapping[str, Any]
SUMMED = ("selection_seconds", "training_seconds", "evaluation_seconds", "bytes")


def result_of(
    run: Run,
    entries: Sequence[Entry],
    sees_all_tasks: bool,
    truncated: Mapping[str, Any],
) -> dict[str, Any]:
    """The result of a finished run.

    Args:
        entries: scores and costs, first of the base model, then after each task.
        sees_all_tasks: whether the method learned all tasks at once, so that it could not forget.
        truncated: task -> number of truncated texts.
    """
    before, *after = entries
    tasks = [task.name for task in run.order.tasks]
    if not sees_all_tasks:
        tasks = tasks[: len(after)]  # shorter if a gate has stopped the run
    rows = [[entry["scores"].get(name) for name in tasks] for entry in after]
    zero_shot = [before["scores"][name] for name in tasks]
    losses = [entry["general_loss"] for entry in entries if entry["general_loss"] is not None]
    return {
        "method": run.method.name,
        "label": run.method.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "order": run.order.name,
        "tasks": tasks,
        "R": rows,
        "zero_shot": zero_shot,
        "general_losses": losses or None,
        **measures_of(Record(rows, zero_shot, losses)),
        "gate": [event for entry in after for event in entry.get("gate", [])] or None,
        "cut": dict(truncated) or None,
        "cost": _cost(entries),
    }


def _cost(entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        **{name: sum(entry.get(name, 0) for entry in entries) for name in SUMMED},
        "parameters": max(entry.get("parameters", 0) for entry in entries),
        "peak_memory": max(entry.get("peak_memory") or 0 for entry in entries) or None,
    }
