"""What came of a run, as plain types: the entry of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .general import general_change
from .measures import RESULT_NAMES, Measures
from .memory import ACCELERATOR_MEMORY

if TYPE_CHECKING:
    from .run import Run

SUMMED = {
    "selection_seconds": "selection_seconds",
    "training_seconds": "seconds",
    "evaluation_seconds": "evaluation_seconds",
    "bytes": "bytes",
}
"""Cost in a result -> name in the ledger, which is summed over tasks."""
PHASES = ("selection", "training", "evaluation")


def result_of(
    run: Run,
    ledger: Sequence[Mapping[str, Any]],
    sees_all_tasks: bool,
    cut: Mapping[str, Any],
    overlap: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The result of a run whose ledger is complete.

    Args:
        sees_all_tasks: it learned all at once, so that there is no order in which it could forget.
        cut: how many texts of which tasks were longer than their limits.
        overlap: of the tasks' supports; None where there are none.
    """
    before, *after = ledger
    tasks = [task.name for task in run.order.tasks]
    if not sees_all_tasks:
        tasks = tasks[: len(after)]  # fewer than all where a gate has stopped the run
    rows = [[entry["scores"].get(name) for name in tasks] for entry in after]
    zero_shot = [before["scores"][name] for name in tasks]
    return {
        "method": run.method.name,
        "label": run.method.label,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "order": run.order.name,
        "tasks": tasks,
        "R": rows,
        "zero_shot": zero_shot,
        **(_of_all_at_once(rows) if sees_all_tasks else _of_matrix(rows, zero_shot)),
        "general": general_change([entry["general"] for entry in ledger]),
        "gate": [event for entry in after for event in entry.get("gate", [])] or None,
        "cut": dict(cut) or None,
        "overlap": overlap,
        "cost": _cost(ledger),
    }


def _of_all_at_once(rows: list[list[float]]) -> dict[str, Any]:
    return dict.fromkeys(RESULT_NAMES) | {"op": sum(rows[-1]) / len(rows[-1])}


def _of_matrix(rows: list[list[float | None]], zero_shot: list[float]) -> dict[str, Any]:
    matrix = [[math.nan if score is None else score for score in row] for row in rows]
    found = Measures.of(matrix, zero_shot)
    return {name: getattr(found, measure) for name, measure in RESULT_NAMES.items()}


def _cost(ledger: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    peaks = [entry.get("peak_memory", {}) for entry in ledger]
    selects = any(entry.get("selection_seconds") for entry in ledger)
    memory = {phase: max((peak.get(phase, 0) for peak in peaks), default=0) or None for phase in PHASES}
    return {
        **{name: sum(entry.get(key, 0) for entry in ledger) for name, key in SUMMED.items()},
        "parameters": max(entry.get("parameters", 0) for entry in ledger),
        "peak_memory": memory | ({} if selects else {"selection": None}),
        "accelerator_memory": {
            name: max(entry.get("accelerator_memory", {}).get(name, 0) for entry in ledger)
            for name in ACCELERATOR_MEMORY
        },
    }
