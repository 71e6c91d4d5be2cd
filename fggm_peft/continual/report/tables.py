"""The tables of a report, as cells of plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .contents import COMPARED, FRONTS, HEADINGS, best_entries, best_runs

Report = Mapping[str, Any]
PHASES = ("selection", "training", "evaluation")
OVER_RUNS = "Mean ± standard deviation over runs (seeds and orders)."
POINT = ("method", "learning rate", "runs")


class Table(NamedTuple):
    """Cells of plain text, without any escaping. The first ``names`` columns contain names, the others figures."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    note: str = ""


def summary_table(report: Report) -> Table:
    """A row for every point."""
    return _measure_table("All points", report["summary"])


def best_table(report: Report) -> Table:
    """A row for every method, at its best learning rate."""
    return _measure_table("Best points", best_entries(report))


def _measure_table(title: str, entries: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for entry in entries:
        figures = [entry[name] for name in HEADINGS]
        # the number of runs is shown if only some of them have the measure
        cells = [shown(f) + (f" (n = {f['n']})" if f and f["n"] != entry["runs"] else "") for f in figures]
        rows.append([*_point(entry), *cells])
    return Table(title, [*POINT, *HEADINGS.values()], rows, note=OVER_RUNS)


def cost_table(report: Report) -> Table:
    """Seconds, memory, trainable values and bytes of every point, without the columns that are empty."""
    cells = [_cost_cells(entry["cost"]) for entry in report["summary"]]
    used = [heading for heading in (cells[0] if cells else {}) if any(row[heading] for row in cells)]
    rows = [[*_point(e), *(row[name] for name in used)] for e, row in zip(report["summary"], cells, strict=True)]
    note = "For a whole run, averaged over runs. Trainable values are those of the largest task."
    return Table("Cost", [*POINT, *used], rows, note=note)


def _cost_cells(cost: Mapping[str, Any]) -> dict[str, str]:
    return {
        **{f"{phase} s": shown(cost.get(f"{phase}_seconds"), ",.1f") for phase in PHASES},
        "peak memory": _mean(cost.get("peak_memory"), bytes_shown),
        "trainable values": _mean(cost.get("parameters"), lambda count: f"{count:,.0f}"),
        "saved": _mean(cost.get("bytes"), bytes_shown),
    }


def difference_tables(report: Report) -> list[Table]:
    """For each measure, a row for every pair of methods."""
    headings = ["a", "b", "a − b", "95 % interval", "n", "verdict"]  # noqa: RUF001
    tables = []
    for name, heading in HEADINGS.items():
        pairs = [(entry, entry["measures"][name]) for entry in report["differences"] if name in COMPARED]
        rows = [[entry["a"], entry["b"], *_difference_cells(difference)] for entry, difference in pairs if difference]
        if rows:
            tables.append(Table(heading, headings, rows, names=2))
    return tables


def _difference_cells(difference: Mapping[str, Any]) -> list[str]:
    ends, mean, n = difference["interval"], signed(difference["mean"]), str(difference["n"])
    if ends is None:
        return [mean, "", n, "one pair: no interval"]
    return [mean, f"{signed(ends[0])} to {signed(ends[1])}", n, "clear" if difference["is_clear"] else "not clear"]


def pareto_tables(report: Report) -> list[Table]:
    """For each front, the points that no other point dominates."""
    tables = []
    for name, points in report["pareto"].items():
        front = [{**point, "runs": point["learned"]["n"]} for point in points if point["is_on_front"]]
        rows = [[*_point(point), shown(point["learned"]), shown(point["cost"])] for point in front]
        if rows:
            title, cost = FRONTS[name]
            tables.append(Table(f"Pareto front: {title}", [*POINT, "learned", cost], rows))
    return tables


def gate_tables(report: Report) -> list[Table]:
    """What gates decided at the best points; empty if no run has a gate."""
    rows = []
    for run in (run for members in best_runs(report).values() for run in members):
        for entry in run.get("gate") or []:
            scores = ["" if entry.get(key) is None else f"{entry[key]:.3f}" for key in ("score", "needed")]
            names = [str(entry.get(key, "")) for key in ("task", "earlier")]
            name = f"seed {run['seed']}, {run['order']}"
            rows.append([run["label"], name, *names, *scores, str(entry.get("action", ""))])
    headings = ["method", "run", "after task", "earlier task", "score", "needed", "action"]
    return [Table("Gates on earlier tasks", headings, rows, names=4)] if rows else []


# --- cells ---------------------------------------------------------------------------------------


def shown(figure: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """The mean of a figure, and its standard deviation over several runs; empty for None."""
    if figure is None:
        return ""
    deviation = "" if figure["std"] is None else f" ± {figure['std']:{form}}"
    return f"{figure['mean']:{form}}".replace("-", "\u2212") + deviation


def signed(value: float) -> str:
    """With a sign; zero after rounding has none."""
    return f"{value:+.3f}".replace("-", "\u2212") if abs(value) >= 0.0005 else "0.000"


def bytes_shown(count: float) -> str:
    """In the largest unit that is not larger than the count."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.{0 if units[0] == 'B' or count >= 100 else 1}f} {units[0]}"


def _mean(figure: Mapping[str, Any] | None, show: Callable[[float], str]) -> str:
    return "" if figure is None else show(figure["mean"])


def _point(entry: Mapping[str, Any]) -> list[str]:
    return [entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"])]
