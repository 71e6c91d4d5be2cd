"""The contents of ``report.json``: summaries, best points, paired differences, Pareto fronts and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

from ..measures import MEASURES, paired_difference, pareto_front, summarise

Run = Mapping[str, Any]
Point = tuple[str, float]
"""A label and a learning rate; it has one run for each seed and order."""

HEADINGS = {
    "op": "OP",
    "op_mean": "mean OP",
    "diagonal": "learned",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "fwt": "FWT",
    "general": "general loss",
}
"""Name of the measure in ``report.json`` -> heading."""
FORMULAS = {name: measure.formula for name, measure in MEASURES.items()} | {
    "general": "change of the mean next-token loss on general text, after the last task, in nats; + is worse"
}
"""Name of the measure in ``report.json`` -> formula in plain text."""
COMPARED = tuple(name for name in HEADINGS if name != "fwt")
"""Measures with paired differences."""
FRONTS = {
    "forgotten": ("Learned against forgotten", "forgotten: −BWT"),  # noqa: RUF001
    "harm": ("Learned against general harm", "rise of the general loss, nats"),
}
"""Name of a Pareto front -> its title, and its cost, of which less is better."""

RULE = (
    "The best point of a method is the learning rate with the highest mean OP_T over its runs; in a tie, the smaller "
    "rise of the general loss decides, then the smaller rate. Every method's rate is chosen on the test examples that "
    "are reported, so all figures are optimistic in the same way."
)
INTERVALS = (
    'A difference is "clear" if its 95 % interval (Student\'s t) excludes zero. The intervals are not corrected for '
    "the number of comparisons: about one in twenty excludes zero by chance."
)


def report_of(results: Sequence[Run]) -> dict[str, Any]:
    """The contents of ``report.json``, from the results of finished runs. Plain types; NaN and infinity become null.

    - ``overview``: a sentence with the numbers of runs, methods, tasks, learning rates, seeds and orders.
    - ``runs``: the results.
    - ``summary``: one entry for each point. A figure is ``{"mean", "std", "n", "interval", "confidence"}`` over seeds
      and orders (std and interval are null for one run), or null if no run has it.
    - ``best``: the rule, and the best point of each label, with the rates that were tried.
    - ``differences``: a - b for the best points of each pair of labels, over the runs with the same seed and order.
    - ``pareto``: for each front the points, and whether another point dominates them.
    - ``measures``: name -> formula.
    - ``warnings``: what a reader should know before comparing.
    """
    runs = [_finite(run) for run in results]
    points: dict[Point, list[Run]] = {}
    for run in runs:
        points.setdefault((run["label"], run["learning_rate"]), []).append(run)
    count = max((len(run["tasks"]) for run in runs), default=0)
    # measures over fewer tasks, of a run that a gate stopped, are not comparable
    values = {
        point: [dict.fromkeys(HEADINGS) if len(run["tasks"]) < count else _measures(run) for run in members]
        for point, members in points.items()
    }
    summary = [_entry(point, members, values[point]) for point, members in points.items()]
    best = _best_points(summary)
    return {
        "overview": _overview(runs),
        "runs": runs,
        "summary": summary,
        "best": {"rule": RULE, "points": best},
        "differences": _differences(best, points, values),
        "pareto": {name: _pareto(name, values) for name in FRONTS},
        "measures": FORMULAS,
        "warnings": [*_tuning_warnings(best), *_run_warnings(results, summary, count)],
    }


# --- look-ups ------------------------------------------------------------------------------------


def best_runs(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Label -> the runs of its best point."""
    rates = {point["label"]: point["learning_rate"] for point in report["best"]["points"]}
    return {
        k: [r for r in report["runs"] if (r["label"], r["learning_rate"]) == (k, rate)] for k, rate in rates.items()
    }


def best_entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary's entries of the best points, one for each label."""
    entries = {(entry["label"], entry["learning_rate"]): entry for entry in report["summary"]}
    return [entries[point["label"], point["learning_rate"]] for point in report["best"]["points"]]


def difference_of(report: Mapping[str, Any], a: str, b: str, name: str) -> dict[str, Any] | None:
    """The paired difference ``a - b`` of the best points of two labels; None if no pair of runs has the measure."""
    for entry in report["differences"]:
        difference = entry["measures"][name]
        if (entry["a"], entry["b"]) == (a, b) or ((entry["a"], entry["b"]) == (b, a) and difference is None):
            return difference
        if (entry["a"], entry["b"]) == (b, a):
            ends = difference["interval"] and [-end for end in reversed(difference["interval"])]
            return {**difference, "mean": -difference["mean"], "interval": ends}
    return None


def summary_of(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Summary of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return summarise(present).to_dict() if present else None


def counted(counts: Sequence[int], word: str) -> str:
    """A number and its word, such as "1 run" or "2 to 3 runs"."""
    low, high = min(counts), max(counts)
    return f"{f'{low} to ' if low != high else ''}{high} {word}{'' if high == 1 else 's'}"


# --- parts ---------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """The value with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _measures(run: Run) -> dict[str, Any]:
    """The measures of a run; of the general loss, its change."""
    return {name: run.get(name) for name in HEADINGS} | {"general": (run.get("general") or {}).get("change")}


def _overview(runs: Sequence[Run]) -> str:
    sets = {"method": "label", "task": "tasks", "learning rate": "learning_rate", "seed": "seed", "order": "order"}
    counts = {word: len({str(run[key]) for run in runs}) for word, key in sets.items()}
    counts["task"] = len({task for run in runs for task in run["tasks"]})
    *parts, last = [counted([number], word) for word, number in counts.items()]
    return f"{counted([len(runs)], 'run')}: {', '.join(parts)} and {last}."


def _entry(point: Point, runs: Sequence[Run], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    costs = [run.get("cost", {}) for run in runs]
    return {
        "label": point[0],
        "method": runs[0]["method"],
        "learning_rate": point[1],
        "runs": len(runs),
        **{name: summary_of(measures[name] for measures in values) for name in HEADINGS},
        "cost": {name: summary_of(cost.get(name) for cost in costs) for name in dict.fromkeys(chain(*costs))},
    }


def _best_points(summary: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each label the point that ``RULE`` picks."""

    def rank(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        op = -math.inf if entry["op"] is None else entry["op"]["mean"]
        general = math.inf if entry["general"] is None else entry["general"]["mean"]
        # rounded: the same scores, summed in another order, are still a tie
        return (-round(op, 12), round(general, 12), entry["learning_rate"])

    points = []
    for label in dict.fromkeys(entry["label"] for entry in summary):
        entries = [entry for entry in summary if entry["label"] == label]
        best = {key: min(entries, key=rank)[key] for key in ("label", "method", "learning_rate", "runs")}
        points.append({**best, "rates": sorted(entry["learning_rate"] for entry in entries)})
    return points


def _differences(
    best: Sequence[Mapping[str, Any]],
    points: Mapping[Point, Sequence[Run]],
    values: Mapping[Point, Sequence[Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    def by_run(side: Mapping[str, Any], name: str) -> dict[tuple[int, str], float]:
        point = side["label"], side["learning_rate"]
        pairs = zip(points[point], values[point], strict=True)
        return {(run["seed"], run["order"]): figures[name] for run, figures in pairs if figures[name] is not None}

    def difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, Any] | None:
        return paired_difference(a, b).to_dict() if a.keys() & b.keys() else None

    return [
        {
            "a": a["label"],
            "b": b["label"],
            "a_rate": a["learning_rate"],
            "b_rate": b["learning_rate"],
            "measures": {name: difference(by_run(a, name), by_run(b, name)) for name in COMPARED},
        }
        for a, b in combinations(best, 2)
    ]


def _pareto(name: str, values: Mapping[Point, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The points, over the runs that have both coordinates."""
    entries: list[dict[str, Any]] = []
    for point, members in values.items():
        key, sign = ("bwt", -1) if name == "forgotten" else ("general", 1)
        pairs = [(m["diagonal"], sign * m[key]) for m in members if None not in (m["diagonal"], m[key])]
        if pairs:
            learned, cost = (summary_of(axis) for axis in zip(*pairs, strict=True))
            entries.append({"label": point[0], "learning_rate": point[1], "learned": learned, "cost": cost})

    front = pareto_front([(entry["learned"]["mean"], entry["cost"]["mean"]) for entry in entries])
    return [{**entry, "is_on_front": position in front} for position, entry in enumerate(entries)]


def _tuning_warnings(points: Sequence[Mapping[str, Any]]) -> list[str]:
    labels: dict[str, list[str]] = {}
    for point in points:
        labels.setdefault(", ".join(f"{rate:g}" for rate in point["rates"]), []).append(point["label"])
    parts = "; ".join(f"{', '.join(names)}: {rates}" for rates, names in labels.items())
    rule = "the methods were run with different learning rates, and a method with more rates has an advantage."
    return [f"Not equally tuned: {rule} {parts}."] if len(labels) > 1 else []


def _run_warnings(results: Sequence[Run], summary: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    numbers = {entry["runs"] for entry in summary}
    unequal = (
        f"The points have different numbers of runs ({min(numbers, default=0)} to {max(numbers, default=0)}), so their "
        "means are over different seeds and orders. The paired differences are over the runs that both methods have."
    )
    warnings = [unequal] if len(numbers) > 1 else []
    for entry in summary:
        runs = [r for r in results if (r["label"], r["learning_rate"]) == (entry["label"], entry["learning_rate"])]
        name = f"{entry['label']} at {entry['learning_rate']:g}"
        if stopped := sum(len(run["tasks"]) < count for run in runs):
            warnings.append(
                f"{name}: a gate stopped {stopped} of {len(runs)} runs before all {count} tasks were learned. Their "
                "costs are included, their measures are not."
            )
        for measure, heading in HEADINGS.items():
            values = [_measures(run)[measure] for run in runs]
            if diverged := sum(value is not None and not math.isfinite(value) for value in values):
                warnings.append(
                    f"{name}: the {heading} is not finite in {diverged} of {len(runs)} runs, because the model "
                    "diverged. Its mean is over the other runs."
                )
    return warnings
