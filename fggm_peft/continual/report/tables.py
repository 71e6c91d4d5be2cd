"""The tables of a report, as cells of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.filesize import decimal

from ..measures import MEASURES, fixed
from .contents import INTERVALS, best_entries

Report = Mapping[str, Any]
POINT = ("method", "learning rate", "runs")


class Table(NamedTuple):
    """Cells of plain text, without any escaping. The first ``names`` columns contain names, the others figures."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    names: int = 1


def glance_of(report: Report) -> Table:
    """What was learned, forgotten and harmed: one row for each method at its best rate, the best first."""
    measures = {"op": "final score", "diagonal": "learned", "bwt": "change", "general": "general text"}
    entries = best_entries(report["best"]["points"], report["summary"])
    rows = [[entry["label"], *(shown(entry[name], ".2f") for name in measures)] for entry in entries]
    note = (
        "Mean scores over the tasks: after the last task, right after each task, and the change of the earlier tasks "
        "since then. General text: the change of the loss, in nats; a rise is worse."
    )
    return _without_empty(Table("At a glance", ["method", *measures.values()], rows, note))


def tables_of(report: Report) -> list[Table]:
    """The tables of the details, without empty tables and columns."""
    tables = (_points(report), _changes(report), _differences(report), _costs(report))
    return [_without_empty(table) for table in tables if table.rows]


def _without_empty(table: Table) -> Table:
    used = [n < table.names or any(column) for n, column in enumerate(zip(*table.rows, strict=True))]
    rows = [[cell for cell, is_used in zip(row, used, strict=True) if is_used] for row in table.rows]
    headings = [cell for cell, is_used in zip(table.headings, used, strict=True) if is_used]
    return table._replace(headings=headings, rows=rows)


def _points(report: Report) -> Table:
    """The measures of every point."""
    best = {(p["label"], p["learning_rate"]) for p in report["best"]["points"] if len(p["rates"]) > 1}
    names, rows = [name for name in MEASURES if any(entry[name] for entry in report["summary"])], []
    for entry in report["summary"]:
        label, *point = _point(entry)
        star = "*" if (entry["label"], entry["learning_rate"]) in best else ""
        figures = [entry[name] for name in names]
        # the number of runs is shown if only some of them have the measure
        cells = [shown(f) + (f" (n = {f['n']})" if f and f["n"] != entry["runs"] else "") for f in figures]
        rows.append([label + star, *point, *cells])
    note = f"Mean ± standard deviation over runs (seeds and orders). {'* ' if best else ''}{report['best']['rule']}"
    return Table("Results", [*POINT, *(MEASURES[name].heading for name in names)], rows, note)


def _changes(report: Report) -> Table:
    """How many answers of each task became wrong and right after the task."""
    runs, rows = [run for run in report["runs"] if run.get("changed")], []
    tasks = list(dict.fromkeys(task for run in runs for task in run["changed"]))
    for entry in report["summary"]:
        point = (entry["label"], entry["learning_rate"])
        if changes := [run["changed"] for run in runs if (run["label"], run["learning_rate"]) == point]:
            own = [[change[task] for change in changes if task in change] for task in tasks]
            rows.append([*_point(entry), *map(_changed, own)])
    note = (
        "Test answers that became wrong (\u2212) and right (+) between the end of their task and the end of the "
        "sequence: means over the runs in which another task follows."
    )
    return Table("Changed answers", [*POINT, *tasks], rows, note)


def _changed(changes: Sequence[Mapping[str, int]]) -> str:
    lost, gained = (sum(change[name] for change in changes) / max(1, len(changes)) for name in ("lost", "gained"))
    return f"\u2212{lost:.3g} +{gained:.3g}" if changes else ""


def _differences(report: Report) -> Table:
    """The difference of every pair of best points in each measure."""
    names = [name for name in MEASURES if any(entry["measures"][name] for entry in report["differences"])]
    rows = [
        [entry["a"], entry["b"], *(_difference(entry["measures"][name]) for name in names)]
        for entry in report["differences"]
        if any(entry["measures"].values())
    ]
    headings = ["a", "b", *(MEASURES[name].heading for name in names)]
    return Table("Paired differences a − b", headings, rows, INTERVALS, names=2)  # noqa: RUF001


def _difference(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    mean, *ends = (fixed(value, "+.3f") for value in (difference["mean"], *(difference["interval"] or [])))
    return mean + (f" [{', '.join(ends)}]" if ends else "") + ("*" if difference["is_clear"] else "")


def _costs(report: Report) -> Table:
    rows = [[*_point(entry), *_cost_cells(entry["cost"]).values()] for entry in report["summary"]]
    note = "For a whole run, averaged over runs. Trainable values are those of the largest task."
    return Table("Time, memory and size", [*POINT, *_cost_cells({})], rows, note)


def _cost_cells(cost: Mapping[str, Any]) -> dict[str, str]:
    phases = ("selection", "training", "evaluation")
    return {
        **{f"{phase} s": shown(cost.get(f"{phase}_seconds"), ",.1f") for phase in phases},
        "peak memory": _mean(cost.get("peak_memory"), decimal),
        "trainable values": _mean(cost.get("parameters"), "{:,}".format),
        "saved": _mean(cost.get("bytes"), decimal),
        "kept for later tasks": _mean(cost.get("kept_bytes"), decimal),
    }


# --- cells ---------------------------------------------------------------------------------------


def shown(figure: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """The mean of a figure, and its standard deviation over several runs; empty for None."""
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:{form}}"
    return fixed(figure["mean"], form) + deviation


def _mean(figure: Mapping[str, Any] | None, show: Callable[[int], str]) -> str:
    return "" if figure is None else show(round(figure["mean"]))


def _point(entry: Mapping[str, Any]) -> list[str]:
    return [entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"])]
