"""The contents of ``report.json``: summaries, best points, paired differences, Pareto fronts and warnings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..measures import MEASURES, pareto_front, signed, summary_of

if TYPE_CHECKING:
    from pandas import DataFrame

Run = Mapping[str, Any]
FRONTS = {
    "forgotten": ("bwt", -1, "Learned against forgotten", "forgotten: −BWT"),  # noqa: RUF001
    "harm": ("general", 1, "Learned against general harm", "rise of the general loss, nats"),
}
"""Name of a Pareto front -> the measure of its cost, its sign, the title of the figure, and the label of its axis."""
RULE = (
    "The best point of a method is the learning rate with the highest mean OP_T over its runs; in a tie, the smaller "
    "rise of the general loss decides, then the smaller rate. Every method's rate is chosen on the test examples that "
    "are reported, so all figures are optimistic in the same way."
)
BOUNDS = ("frozen", "multitask")
"""The base model and training on all tasks at once: bounds of what a sequence can reach. The headline omits them."""
ONE_RATE = "Each method was run with one learning rate."
INTERVALS = (
    "The best points of two methods are compared over the runs with the same seed and order, which removes the effect "
    "of seed and order on both. Brackets are 95 % intervals by Student's t. A difference is clear (*) if its interval "
    "excludes zero. The intervals are not corrected for the number of comparisons: about one in twenty excludes zero "
    "by chance. One pair of runs has no interval."
)


def report_of(results: Sequence[Run]) -> dict[str, Any]:
    """The contents of ``report.json``, from the results of finished runs. Plain types; NaN and infinity become null.

    A point is a label and a learning rate; it has one run for each seed and order. A figure is ``{"mean", "std", "n",
    "interval"}`` over its runs (std and interval are null for one run), or null if no run has it. ``differences`` are
    those of the best points of two labels, over the runs with the same seed and order.
    """
    runs = json.loads(json.dumps(results), parse_constant=lambda name: None)
    frame = _frame(runs)
    summary = [_entry(members) for _, members in frame.groupby(["label", "learning_rate"], sort=False)]
    best = _best_points(summary)
    differences = _differences(best, frame)
    return {
        "headline": _headline(best, summary, differences, task_count(runs)),
        "overview": _overview(runs),
        "runs": runs,
        "summary": summary,
        "best": {"rule": RULE if any(len(point["rates"]) > 1 for point in best) else ONE_RATE, "points": best},
        "differences": differences,
        "pareto": {name: _pareto(name, frame) for name in FRONTS},
        "measures": {name: MEASURES[name].formula for name in MEASURES},
        "warnings": [*_tuning_warnings(best), *_run_warnings(results, summary)],
    }


def _frame(runs: Sequence[Run]) -> DataFrame:
    """One row for each run: what distinguishes it, its measures, and its costs as ``cost.NAME``."""
    import pandas

    names, count = ("label", "method", "learning_rate", "seed", "order"), task_count(runs)
    rows = []
    for run in runs:
        # measures over fewer tasks, of a run that a gate stopped, are not comparable
        measures = {name: run.get(name) if len(run["tasks"]) == count else None for name in MEASURES}
        costs = {f"cost.{name}": value for name, value in run.get("cost", {}).items()}
        rows.append({**{name: run[name] for name in names}, **measures, **costs})
    return pandas.DataFrame(rows)


def task_count(runs: Sequence[Run]) -> int:
    """The number of tasks of a complete run."""
    return max((run["task_count"] for run in runs), default=0)


def _overview(runs: Sequence[Run]) -> str:
    sets = {"method": "label", "learning rate": "learning_rate", "seed": "seed", "order": "order"}
    parts = [counted([len({run[key] for run in runs})], word) for word, key in sets.items()]
    parts.insert(1, counted([len({task for run in runs for task in run["tasks"]})], "task"))
    return f"{counted([len(runs)], 'run')}: {', '.join(parts[:-1])} and {parts[-1]}."


def best_entries(best: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The summaries of the best points, the highest final score first."""
    points = {(point["label"], point["learning_rate"]) for point in best}
    entries = [entry for entry in summary if (entry["label"], entry["learning_rate"]) in points]
    return sorted(entries, key=lambda entry: math.inf if entry["op"] is None else -entry["op"]["mean"])


def _headline(best: Sequence[Any], summary: Sequence[Any], differences: Sequence[Any], count: int) -> str:
    """The highest and the lowest final score, what they cost on general text, and whether they differ clearly."""
    entries = [e for e in best_entries(best, summary) if e["op"] is not None and e["method"] not in BOUNDS]
    if not entries:
        return "No run of a method that learns the tasks in sequence is complete."
    first, last = entries[0], entries[-1]
    tasks = counted([count], "task")
    text = f"After {tasks} in sequence, {first['label']} has a mean score of {first['op']['mean']:.2f}"
    if len(entries) == 1:
        return f"{text}."
    text += f", the highest, and {last['label']} has {last['op']['mean']:.2f}, the lowest."
    if first["general"] and last["general"]:
        changes = [signed(entry["general"]["mean"]) for entry in (first, last)]
        text += f" The loss on general text changed by {changes[0]} and {changes[1]} nats."
    pair = next(d for d in differences if {d["a"], d["b"]} == {first["label"], last["label"]})
    if (difference := pair["measures"]["op"]) is None:
        return f"{text} These methods have no seed and order in common."
    if difference["interval"] is None:
        return f"{text} One pair of runs does not show whether this difference is due to chance."
    low, high = sorted(end if pair["a"] == first["label"] else -end for end in difference["interval"])
    clear = "is clear" if difference["is_clear"] else "is not clear"
    return f"{text} The difference {clear} (95 % interval {signed(low)} to {signed(high)})."


def counted(counts: Sequence[int], word: str) -> str:
    """A number and its word, such as "1 run" or "2 to 3 runs"."""
    low, high = min(counts), max(counts)
    return f"{f'{low} to ' if low != high else ''}{high} {word}{'' if high == 1 else 's'}"


def _entry(members: DataFrame) -> dict[str, Any]:
    costs = [name for name in members if name.startswith("cost.")]
    return {
        **members[["label", "method", "learning_rate"]].iloc[0],
        "runs": len(members),
        **{name: summary_of(members[name]) for name in MEASURES},
        "cost": {name.removeprefix("cost."): summary_of(members[name]) for name in costs},
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
        entries = sorted((entry for entry in summary if entry["label"] == label), key=rank)
        best = {key: entries[0][key] for key in ("label", "method", "learning_rate", "runs")}
        points.append({**best, "rates": sorted(entry["learning_rate"] for entry in entries)})
    return points


def _differences(best: Sequence[Mapping[str, Any]], frame: DataFrame) -> list[dict[str, Any]]:
    def runs_of(point: Mapping[str, Any]) -> DataFrame:
        is_own = (frame["label"] == point["label"]) & (frame["learning_rate"] == point["learning_rate"])
        return frame[is_own].set_index(["seed", "order"])[list(MEASURES)].astype(float)

    def difference(values: Any) -> dict[str, Any] | None:
        if (summary := summary_of(values)) is None:
            return None
        low, high = summary["interval"] or (0.0, 0.0)
        return {**summary, "is_clear": not low <= 0 <= high}

    return [
        {
            **{"a": a["label"], "b": b["label"], "a_rate": a["learning_rate"], "b_rate": b["learning_rate"]},
            "measures": {name: difference(values) for name, values in (runs_of(a) - runs_of(b)).items()},
        }
        for a, b in combinations(best, 2)
    ]


def _pareto(name: str, frame: DataFrame) -> list[dict[str, Any]]:
    """The points, over the runs that have both coordinates."""
    measure, sign, *_ = FRONTS[name]
    entries: list[dict[str, Any]] = []
    for _, members in frame.dropna(subset=["diagonal", measure]).groupby(["label", "learning_rate"], sort=False):
        learned, cost = summary_of(members["diagonal"]), summary_of(sign * members[measure])
        entries.append({**members[["label", "learning_rate"]].iloc[0], "learned": learned, "cost": cost})
    front = pareto_front([(entry["learned"]["mean"], entry["cost"]["mean"]) for entry in entries])
    return [{**entry, "is_on_front": position in front} for position, entry in enumerate(entries)]


def _tuning_warnings(points: Sequence[Mapping[str, Any]]) -> list[str]:
    if len({len(point["rates"]) for point in points}) < 2:
        return []
    labels: dict[str, list[str]] = {}
    for point in points:
        labels.setdefault(", ".join(f"{rate:g}" for rate in point["rates"]), []).append(point["label"])
    parts = "; ".join(f"{', '.join(names)}: {rates}" for rates, names in labels.items())
    rule = "the methods were run with different numbers of learning rates, and more rates are an advantage."
    return [f"Not equally tuned: {rule} {parts}."]


def _run_warnings(results: Sequence[Run], summary: Sequence[Mapping[str, Any]]) -> list[str]:
    numbers, count = {entry["runs"] for entry in summary}, task_count(results)
    unequal = (
        f"The points have different numbers of runs ({min(numbers, default=0)} to {max(numbers, default=0)}), so their "
        "means are over different seeds and orders. The paired differences are over the runs that both methods have."
    )
    warnings = [unequal] if len(numbers) > 1 else []
    for run in results:
        name = f"{run['label']} at {run['learning_rate']:g}, seed {run['seed']}, order {run['order']}"
        for event in run.get("gate") or []:
            scores = f"{event['score']:.3f} instead of {event['needed']:.3f}"
            warnings.append(f"{name}: after {event['task']}, {event['earlier']} scored {scores}: {event['action']}.")
        if len(run["tasks"]) < count:
            warnings.append(f"{name}: stopped before all {count} tasks. Its costs count, its measures do not.")
        for measure in MEASURES:
            value = run.get(measure)
            if value is not None and not math.isfinite(value):
                heading = MEASURES[measure].heading
                warnings.append(f"{name}: the {heading} is not finite, because the model diverged. Means leave it out.")
    return warnings
