"""The figures of a report: summaries, the best point of each method, paired differences, Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..measures import MEASURES, paired_difference, pareto_front, summarise

Run = Mapping[str, Any]
Point = tuple[str, float]
"""A label and a learning rate; several runs are one point."""

COLUMNS = {
    "OP": "op",
    "mean OP": "op_mean",
    "learned": "diagonal",
    "BWT": "bwt",
    "forgetting": "forgetting",
    "FWT": "fwt",
    "general loss": "general",
}
"""Heading -> name of the measure in ``report.json``."""
HEADINGS = {name: heading for heading, name in COLUMNS.items()}
FORMULAS = {
    "op": MEASURES["final_op"].formula,
    "op_mean": MEASURES["mean_op"].formula,
    "diagonal": MEASURES["diagonal_mean"].formula,
    "bwt": MEASURES["backward_transfer"].formula,
    "forgetting": MEASURES["forgetting"].formula,
    "fwt": MEASURES["forward_transfer"].formula,
    "general": "change of the mean next-token loss on general text, after the last task, in nats; + is worse",
}
"""Name of the measure in ``report.json`` -> formula in plain text."""
COMPARED = ("op", "op_mean", "diagonal", "bwt", "forgetting", "general")
"""Measures whose paired differences are taken."""
LESS_IS_BETTER = ("forgetting", "general")

RULE = (
    "The best point of a method is the learning rate with the highest mean OP_T over its runs; ties go to the smaller "
    "rise of the general loss, then to the smaller rate. The rate is chosen on the same test examples that are "
    "reported, for every method, so all of these figures are optimistic in the same way."
)
INTERVALS = (
    'A difference is "clear" if its 95 % interval (Student\'s t) excludes zero. The intervals are not corrected for '
    "the number of comparisons: about one in twenty excludes zero by chance."
)
FRONTS = {"forgotten": lambda run: _negative(figure(run, "bwt")), "harm": lambda run: figure(run, "general")}
"""What the mean of R[t,t] is set against, by name; less is better."""


def report_of(results: Sequence[Run]) -> dict[str, Any]:
    """Everything that is in ``report.json``, of a comparison that is finished or not. Plain types, no NaN.

    - ``overview``: a sentence with the numbers of runs, methods, tasks, learning rates, seeds and orders.
    - ``runs``: the results; what is not finite is null.
    - ``summary``: one entry for each label and learning rate. A figure is ``{"mean", "std", "n", "interval",
      "confidence"}`` over seeds and orders (std and interval are null for one run), or null where it has no meaning.
    - ``best``: the rule, and one point for each label, with the rates that it was chosen from.
    - ``differences``: of every two labels' best points over the runs with the same seed and order, a - b.
    - ``pareto``: points that no other beats, for each label over its rates and over all labels.
    - ``measures``: name -> formula.
    - ``warnings``: what a reader should know before comparing.
    """
    runs = [finite(run) for run in results]
    whole = with_whole_measures(runs)
    points, summary = _points(whole), summarised(whole)
    best = best_points(summary)
    return {
        "overview": _overview(runs),
        "runs": runs,
        "summary": summary,
        "best": best,
        "differences": _differences(best["points"], points),
        "pareto": {name: _pareto(points, worse) for name, worse in FRONTS.items()},
        "measures": dict(FORMULAS),
        "warnings": [*_tuning_warnings(best["points"]), *_run_warnings(results, summary)],
    }


def _overview(runs: Sequence[Run]) -> str:
    counts = {
        "run": len(runs),
        "method": len({run["label"] for run in runs}),
        "task": len({task for run in runs for task in run["tasks"]}),
        "learning rate": len({run["learning_rate"] for run in runs}),
        "seed": len({run["seed"] for run in runs}),
        "order": len({run["order"] for run in runs}),
    }
    first, *parts, last = [f"{number} {word}" + ("" if number == 1 else "s") for word, number in counts.items()]
    return f"{first}: {', '.join(parts)} and {last}."


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite: a model that diverged has a loss of NaN."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_whole_measures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs, without measures where a gate has stopped one: over fewer tasks they are not the same measures."""
    count = max((len(run["tasks"]) for run in runs), default=0)
    return [{**run, **({} if len(run["tasks"]) == count else dict.fromkeys(COLUMNS.values()))} for run in runs]


def figure(run: Run, name: str) -> float | None:
    """A measure of one run: of the general loss, its change at the end."""
    value = run.get(name)
    return value.get("change") if isinstance(value, Mapping) else value


def summary_of(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Summary of the values that are there; None if none is."""
    known = [value for value in values if value is not None]
    return summarise(known).to_dict() if known else None


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None if none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def runs_at(report: Mapping[str, Any], label: str, learning_rate: float) -> list[dict[str, Any]]:
    """The runs of one point."""
    return [run for run in report["runs"] if (run["label"], run["learning_rate"]) == (label, learning_rate)]


def entry_at(report: Mapping[str, Any], label: str, learning_rate: float) -> dict[str, Any]:
    """The entry of the summary of one point."""
    return next(e for e in report["summary"] if (e["label"], e["learning_rate"]) == (label, learning_rate))


def best_entries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of the summary of the best points, one for each label."""
    return [entry_at(report, point["label"], point["learning_rate"]) for point in report["best"]["points"]]


def difference_of(report: Mapping[str, Any], a: str, b: str, name: str) -> dict[str, Any] | None:
    """The paired difference ``a - b`` of two labels' best points; None where no pair has this measure."""
    for entry in report["differences"]:
        if (entry["a"], entry["b"]) == (a, b):
            return entry["measures"][name]
        if (entry["a"], entry["b"]) == (b, a):
            return turned(entry["measures"][name])
    return None


def turned(difference: dict[str, Any] | None) -> dict[str, Any] | None:
    """``b - a`` of ``a - b``."""
    if difference is None:
        return None
    ends = difference["interval"]
    return {**difference, "mean": -difference["mean"], "interval": None if ends is None else [-ends[1], -ends[0]]}


def pairs_of(a: Mapping[Any, Run], b: Mapping[Any, Run], names: Iterable[str] = COMPARED) -> dict[str, Any]:
    """Of each measure the paired difference ``a - b`` of runs with the same key, or None where there is no pair."""
    return {name: _difference(_known(a, name), _known(b, name)) for name in names}


def _difference(a: Mapping[Any, float], b: Mapping[Any, float]) -> dict[str, Any] | None:
    return paired_difference(a, b).to_dict() if a.keys() & b.keys() else None


def _known(runs: Mapping[Any, Run], name: str) -> dict[Any, float]:
    values = {key: figure(run, name) for key, run in runs.items()}
    return {key: value for key, value in values.items() if value is not None}


# --- points --------------------------------------------------------------------------------------


def _points(runs: Sequence[Run]) -> dict[Point, list[Run]]:
    points: dict[Point, list[Run]] = {}
    for run in runs:
        points.setdefault((run["label"], run["learning_rate"]), []).append(run)
    return points


def summarised(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One entry for each label and learning rate, over its runs."""
    return [_entry(point, members) for point, members in _points(runs).items()]


def _entry(point: Point, runs: Sequence[Run]) -> dict[str, Any]:
    costs = [run.get("cost", {}) for run in runs]
    return {
        "label": point[0],
        "method": runs[0]["method"],
        "learning_rate": point[1],
        "runs": len(runs),
        **{name: summary_of(figure(run, name) for run in runs) for name in COLUMNS.values()},
        "cost": _summaries(costs),
    }


def _summaries(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A summary of every number, by name; of what is nested, likewise."""
    names = dict.fromkeys(name for value in values for name in value)
    found = {name: [value.get(name) for value in values] for name in names}
    return {
        name: _summaries([entry or {} for entry in entries])
        if any(isinstance(entry, Mapping) for entry in entries)
        else summary_of(entries)
        for name, entries in found.items()
    }


def best_points(summary: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``{"rule", "points"}``: of each label the entry of ``summary`` that ``RULE`` picks, and what it was one of."""
    labels: dict[str, list[Mapping[str, Any]]] = {}
    for entry in summary:
        labels.setdefault(entry["label"], []).append(entry)

    def rank(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        op = -math.inf if entry["op"] is None else entry["op"]["mean"]
        general = math.inf if entry["general"] is None else entry["general"]["mean"]
        # rounded, as the same scores summed in another order are still a tie
        return (-round(op, 12), round(general, 12), entry["learning_rate"])

    points = []
    for label, entries in labels.items():
        found = min(entries, key=rank)
        rates = sorted(entry["learning_rate"] for entry in entries)
        points.append(
            {
                "label": label,
                "method": found["method"],
                "learning_rate": found["learning_rate"],
                "rates": rates,
                "runs": found["runs"],
            }
        )
    return {"rule": RULE, "points": points}


def _differences(best: Sequence[Mapping[str, Any]], points: Mapping[Point, list[Run]]) -> list[dict[str, Any]]:
    found = []
    for position, a in enumerate(best):
        for b in best[position + 1 :]:
            a_runs, b_runs = (
                {(run["seed"], run["order"]): run for run in points[side["label"], side["learning_rate"]]}
                for side in (a, b)
            )
            found.append(
                {
                    "a": a["label"],
                    "b": b["label"],
                    "a_rate": a["learning_rate"],
                    "b_rate": b["learning_rate"],
                    "measures": pairs_of(a_runs, b_runs),
                }
            )
    return found


def _pareto(points: Mapping[Point, list[Run]], worse) -> dict[str, Any]:
    """The points of all labels and which of them are on a front; a run counts if it has both coordinates."""
    means: dict[Point, dict[str, Any]] = {}
    for point, runs in points.items():
        pairs = [(run.get("diagonal"), worse(run)) for run in runs]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if known:
            x, y = (summary_of(axis) for axis in zip(*known, strict=True))
            means[point] = {"label": point[0], "learning_rate": point[1], "learned": x, "cost": y}

    def front(members: list[Point]) -> list[Point]:
        coordinates = [(means[point]["learned"]["mean"], means[point]["cost"]["mean"]) for point in members]
        return [members[position] for position in pareto_front(coordinates)]

    labels = dict.fromkeys(label for label, _ in means)
    of_label = {label: front([point for point in means if point[0] == label]) for label in labels}
    return {
        "points": list(means.values()),
        "labels": {label: [rate for _, rate in members] for label, members in of_label.items()},
        "all": [{"label": label, "learning_rate": rate} for label, rate in front(list(means))],
    }


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


# --- warnings ------------------------------------------------------------------------------------


def _tuning_warnings(points: Sequence[Mapping[str, Any]]) -> list[str]:
    lists: dict[tuple[float, ...], list[str]] = {}
    for point in points:
        lists.setdefault(tuple(point["rates"]), []).append(point["label"])
    if len(lists) < 2:
        return []
    parts = [f"{', '.join(labels)}: {', '.join(f'{r:g}' for r in rates)}" for rates, labels in lists.items()]
    return [
        "Not equally tuned: the labels were run with different learning rates, and one that had more to choose from "
        f"looks better for it. {'; '.join(parts)}."
    ]


def _run_warnings(results: Sequence[Run], summary: Sequence[Mapping[str, Any]]) -> list[str]:
    counts = {entry["runs"] for entry in summary}
    found = []
    if len(counts) > 1:
        found.append(
            f"Not all points have the same number of runs ({min(counts)} to {max(counts)}): means are over different "
            "seeds and orders. The paired differences are over those that both have."
        )
    count = max((len(run["tasks"]) for run in results), default=0)
    for entry in summary:
        runs = [r for r in results if (r["label"], r["learning_rate"]) == (entry["label"], entry["learning_rate"])]
        stopped = sum(len(run["tasks"]) < count for run in runs)
        if stopped:
            found.append(
                f"{entry['label']} at {entry['learning_rate']:g}: {stopped} of {len(runs)} runs ended before all "
                f"{count} tasks were learned, stopped by a gate. Their costs count, their measures do not."
            )
        for heading, name in COLUMNS.items():
            values = [figure(run, name) for run in runs]
            lost = sum(value is not None and not math.isfinite(value) for value in values)
            if lost:
                found.append(
                    f"{entry['label']} at {entry['learning_rate']:g}: the {heading} is not finite in {lost} of "
                    f"{len(runs)} runs, which are left out of its mean; the model diverged there."
                )
    return found
