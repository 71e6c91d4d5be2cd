"""The tables of a report as plain cells, which Markdown, HTML and the terminal each write in their own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .contents import COLUMNS, COMPARED, HEADINGS, best_entries, runs_at, summary_of

PHASES = ("selection", "training", "evaluation")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Table:
    """Cells of plain text, not escaped for anything.

    Args:
        title: what it shows.
        headings: of the columns.
        rows: as many cells in each as there are headings.
        names: how many columns, from the left, are names; the others are figures.
        note: what a reader must know to read it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    note: str = ""


# --- cells ---------------------------------------------------------------------------------------


def shown(figure: Mapping[str, Any] | None) -> str:
    """A figure of the summary in a cell: mean, and standard deviation where there are several runs."""
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.3f}"
    return f"{figure['mean']:.3f}".replace("-", "\u2212") + deviation


def counted(entry: Mapping[str, Any], name: str) -> str:
    """As ``shown``, with the number of runs where it is not that of the whole entry."""
    figure = entry[name]
    few = figure is not None and figure["n"] != entry["runs"]
    return shown(figure) + (f" (n = {figure['n']})" if few else "")


def difference_cells(difference: Mapping[str, Any] | None) -> list[str]:
    """Mean difference, interval, number of pairs, and whether the interval leaves zero out."""
    if difference is None:
        return ["", "", "0", "no pair"]
    ends = difference["interval"]
    if ends is None:
        return [signed(difference["mean"]), "", str(difference["n"]), "one pair: no interval"]
    interval = f"{signed(ends[0])} to {signed(ends[1])}"
    return [
        signed(difference["mean"]),
        interval,
        str(difference["n"]),
        "clear" if difference["is_clear"] else "not clear",
    ]


def signed(value: float) -> str:
    """With its sign, and a real minus; what rounds to zero has none."""
    return f"{value:+.3f}".replace("-", "\u2212") if abs(value) >= 0.0005 else "0.000"


def bytes_shown(count: float) -> str:
    """In the largest unit of which there is at least one."""
    unit = 0
    while count >= 1024 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.{0 if unit == 0 or count >= 100 else 1}f} {UNITS[unit]}"


def _mean(figure: Mapping[str, Any] | None, show: Callable[[float], str]) -> str:
    return "" if figure is None else show(figure["mean"])


def _seconds(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.1f}"
    return f"{figure['mean']:,.1f}{deviation}"


# --- tables --------------------------------------------------------------------------------------

OVER_RUNS = "Mean ± standard deviation over runs (seeds and orders)."


def summary_table(report: Mapping[str, Any]) -> Table:
    """A row for every label and learning rate."""
    rows = [[*_point(e), *(counted(e, name) for name in COLUMNS.values())] for e in report["summary"]]
    return Table("All points", ["method", "learning rate", "runs", *COLUMNS], rows, note=OVER_RUNS)


def best_table(report: Mapping[str, Any]) -> Table:
    """A row for every label, at its best learning rate."""
    entries = zip(report["best"]["points"], best_entries(report), strict=True)
    rows = [
        [point["label"], f"{point['learning_rate']:g}", str(len(point["rates"])), str(point["runs"])]
        + [counted(entry, name) for name in COLUMNS.values()]
        for point, entry in entries
    ]
    return Table("Best points", ["method", "best rate", "of rates", "runs", *COLUMNS], rows, note=OVER_RUNS)


def cost_table(report: Mapping[str, Any]) -> Table:
    """Seconds, memory, trainable values and bytes of every point; columns that no run has are left out."""
    cells = [_cost_cells(entry["cost"]) for entry in report["summary"]]
    used = [heading for heading in (cells[0] if cells else {}) if any(row[heading] for row in cells)]
    rows = [
        [*_point(entry), *(row[heading] for heading in used)]
        for entry, row in zip(report["summary"], cells, strict=True)
    ]
    note = "Of a whole run, in the mean over runs. Peaks are of memory; trainable values those of the largest task."
    return Table("Cost", ["method", "learning rate", "runs", *used], rows, note=note)


def _cost_cells(cost: Mapping[str, Any]) -> dict[str, str]:
    """Heading -> cell."""
    memory = cost.get("peak_memory") or {}
    return {
        **{f"{phase} s": _seconds(cost.get(f"{phase}_seconds")) for phase in PHASES},
        **{f"{phase} peak": _mean(memory.get(phase), bytes_shown) for phase in PHASES},
        "trainable values": _mean(cost.get("parameters"), lambda count: f"{count:,.0f}"),
        "saved": _mean(cost.get("bytes"), bytes_shown),
    }


def _point(entry: Mapping[str, Any]) -> list[str]:
    return [entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"])]


def difference_tables(report: Mapping[str, Any]) -> list[Table]:
    """One table for each measure that any two labels have, with a row for every pair of labels."""
    tables = []
    for name in COMPARED:
        found = [(entry, entry["measures"][name]) for entry in report["differences"]]
        rows = [[e["a"], e["b"], *difference_cells(difference)] for e, difference in found if difference is not None]
        if rows:
            headings = ["a", "b", "a − b", "95 % interval", "n", "verdict"]  # noqa: RUF001
            tables.append(Table(HEADINGS[name], headings, rows, names=2))
    return tables


def pareto_table(report: Mapping[str, Any], front: str) -> Table:
    """The points that no other beats, over all methods."""
    found = report["pareto"][front]
    best = {(point["label"], point["learning_rate"]) for point in found["all"]}
    rows = [
        [p["label"], f"{p['learning_rate']:g}", str(p["learned"]["n"]), shown(p["learned"]), shown(p["cost"])]
        for p in found["points"]
        if (p["label"], p["learning_rate"]) in best
    ]
    other = {"forgotten": "forgotten (-BWT)", "harm": "general loss"}[front]
    return Table("On the front of all methods", ["method", "learning rate", "runs", "learned", other], rows)


def general_task_tables(report: Mapping[str, Any]) -> list[Table]:
    """Scores on tasks of general ability, before and after, at the best points; empty where no run has them."""
    rows = []
    for point in report["best"]["points"]:
        runs = [
            (run.get("general") or {}).get("tasks") or {}
            for run in runs_at(report, point["label"], point["learning_rate"])
        ]
        for task in dict.fromkeys(task for run in runs for task in run):
            figures = [
                summary_of(run[task].get(key) for run in runs if task in run) for key in ("base", "final", "change")
            ]
            number = next((figure["n"] for figure in figures if figure is not None), 0)
            rows.append([point["label"], task, str(number), *map(shown, figures)])
    headings = ["method", "task", "runs", "before", "after", "change"]
    return [Table("General ability", headings, rows, names=2, note=OVER_RUNS)] if rows else []


def gate_tables(report: Mapping[str, Any]) -> list[Table]:
    """What gates decided about earlier tasks, at the best points; empty where no run has any."""
    rows = []
    for point in report["best"]["points"]:
        for run in runs_at(report, point["label"], point["learning_rate"]):
            for entry in run.get("gate") or []:
                scores = ["" if entry.get(key) is None else f"{entry[key]:.3f}" for key in ("score", "needed")]
                names = [str(entry.get(key, "")) for key in ("task", "earlier")]
                rows.append(
                    [run["label"], f"seed {run['seed']}, {run['order']}", *names, *scores, str(entry.get("action", ""))]
                )
    headings = ["method", "run", "after task", "earlier task", "score", "needed", "action"]
    return [Table("Gates on earlier tasks", headings, rows, names=4)] if rows else []
