"""The figures of the HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from ... import plots
from .contents import COMPARED, FRONTS, HEADINGS, best_entries, best_runs, counted, difference_of

Report = Mapping[str, Any]
Runs = Mapping[str, list[dict[str, Any]]]
Matrix = list[list[float | None]]

GLYPHS = dict(zip(plots.MARKERS, "●■▲◆▼✚✖⬟◀⬢▶★", strict=True))


class Picture(NamedTuple):
    """A figure of the page: its title, the ``<svg>`` element, and a note with the number of runs."""

    title: str
    svg: str
    note: str


def legend_of(report: Report) -> list[tuple[str, str, str]]:
    """Label, color and marker of each method."""
    looks = plots.looks([point["label"] for point in report["best"]["points"]])
    return [(label, look["color"], GLYPHS[look["marker"]]) for label, look in looks.items()]


def pictures_of(report: Report) -> dict[str, list[Picture]]:
    """Section of the page -> its figures. A method looks the same in all of them.

    Matrices and curves are means over the runs of one order, that of the first run, at each method's best point.
    """
    looks = plots.looks([point["label"] for point in report["best"]["points"]])
    count = max((len(run["tasks"]) for run in report["runs"]), default=0)
    runs: dict[str, list[dict[str, Any]]] = {}
    for label, members in best_runs(report).items():
        order = report["runs"][0]["order"]
        if shown := [run for run in members if (run["order"], len(run["tasks"])) == (order, count)]:
            runs[label] = shown
    matrices = {label: _mean_matrix([[r["zero_shot"], *r["R"]] for r in members]) for label, members in runs.items()}
    with plots.style():
        return {
            "fronts": [_front(report, name, looks) for name, points in report["pareto"].items() if points],
            "differences": list(_differences(report)),
            "matrices": list(_matrices(runs, matrices)),
            "curves": list(_curves(runs, matrices, looks)),
            "general": list(_general(runs, looks)),
        }


def _front(report: Report, name: str, looks: Mapping[str, plots.Look]) -> Picture:
    """What was learned against its cost, with a line through the points that no other point dominates."""
    from adjustText import adjust_text
    from matplotlib.transforms import Bbox

    points, (title, cost) = report["pareto"][name], FRONTS[name]
    best = [(point["label"], point["learning_rate"]) for point in report["best"]["points"]]
    means = {(p["label"], p["learning_rate"]): (p["cost"]["mean"], p["learned"]["mean"]) for p in points}
    front = [key for key, point in zip(means, points, strict=True) if point["is_on_front"]]
    figure, (axes,) = plots.new_figure(3.4, width=4.0)
    axes.set(xlabel=f"{cost} (less is better)", ylabel="learned: mean R[t,t]")
    axes.plot(*zip(*sorted(means[point] for point in front), strict=True), color=plots.FAINT, linewidth=3, alpha=0.35)
    for (label, rate), entry in zip(means, points, strict=True):
        x, y = means[label, rate]
        look = looks[label] | {"linestyle": "none", "markeredgewidth": 0.9, "ecolor": (looks[label]["color"], 0.45)}
        look |= {"markersize": 7} if (label, rate) in best else {"markersize": 5, "fillstyle": "none"}
        axes.errorbar(x, y, entry["learned"]["std"], entry["cost"]["std"], elinewidth=0.9, **look)
    axes.margins(0.12)
    figure.draw_without_rendering()  # labels are placed in the final layout, which they must not change
    labels = [axes.text(*means[point], plots.shortened(point[0])) for point in best if point in means]
    for label in labels:
        label.set_in_layout(False)
    centers = axes.transData.transform(list(means.values()))
    markers = [Bbox(axes.transData.inverted().transform([center - 6, center + 6])) for center in centers]
    line = {"arrowstyle": "-", "color": plots.FAINT, "linewidth": 0.6}
    adjust_text(labels, objects=markers, ax=axes, iter_lim=1000, expand=(1.1, 1.3), arrowprops=line)
    names = ", ".join(f"{label} at {rate:g}" for label, rate in front)
    alt = f"{title}: {len(means)} points of {len(looks)} methods. No other point dominates {names}."
    note = (
        f"Better points are further up and to the left. Each point is a mean over "
        f"{counted([point['learned']['n'] for point in points], 'run')}; bars are one standard deviation. "
        "Filled: a method's best rate. Hollow: its other rates. No point dominates those on the grey line."
    )
    return Picture(title, plots.to_svg(figure, alt), note)


def _differences(report: Report) -> Iterator[Picture]:
    """For each measure, the paired differences to the method with the highest OP."""
    for measure in COMPARED:
        ranked = [entry for entry in best_entries(report) if entry[measure] is not None]
        # a method that trains on all tasks at once is no reference for the others
        candidates = [entry for entry in ranked if entry["diagonal"] is not None] or ranked
        if len(ranked) < 2:
            continue
        reference = max(candidates, key=lambda entry: entry["op"]["mean"])["label"]
        differences = {e["label"]: difference_of(report, e["label"], reference, measure) for e in ranked}
        rows = {label: difference for label, difference in differences.items() if label != reference and difference}
        if rows:
            yield _intervals(measure, reference, rows)


def _intervals(measure: str, reference: str, rows: Mapping[str, Mapping[str, Any]]) -> Picture:
    title = f"{HEADINGS[measure]}: difference to {reference}"
    figure, (axes,) = plots.new_figure(0.75 + 0.22 * len(rows))
    axes.axvline(0, color=plots.INK, linewidth=0.9)
    for row, difference in enumerate(rows.values()):
        is_clear, mean, ends = (difference[key] for key in ("is_clear", "mean", "interval"))
        color = plots.COLORS[0] if is_clear else plots.FAINT
        axes.plot(ends or [mean, mean], [row, row], color=color, linewidth=2.2)
        face = color if is_clear else "none"
        axes.plot(mean, row, "o", color=color, markersize=6, markerfacecolor=face, markeredgewidth=1)
    axes.set_yticks(range(len(rows)), [plots.shortened(name, 22) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(f"difference ({'less' if measure in ('forgetting', 'general') else 'more'} is better)")
    texts = [f"{label} {d['mean']:+.3f}" for label, d in rows.items()]
    counts = counted([difference["n"] for difference in rows.values()], "pair")
    has_intervals = any(difference["interval"] for difference in rows.values())
    bars = "bars are 95 % intervals, blue if they exclude zero" if has_intervals else "one pair has no interval"
    return Picture(title, plots.to_svg(figure, f"{title}: {', '.join(texts)}."), f"{counts}; {bars}.")


def _matrices(runs: Runs, matrices: Mapping[str, Matrix]) -> Iterator[Picture]:
    """The scores of each method on each task after each task, on one scale."""
    values = [value for matrix in matrices.values() for row in matrix for value in row if value is not None]
    for label, matrix in matrices.items():
        tasks, rate = runs[label][0]["tasks"], runs[label][0]["learning_rate"]
        rows = ["zero-shot", *(tasks if len(matrix) == len(tasks) + 1 else ["all tasks"])]
        figure, (axes,) = plots.new_figure(plots.heat_map_height(len(matrix), tasks))
        plots.heat_map(axes, matrix, rows, tasks, min(values), max(values))
        axes.set(xlabel="score on", ylabel="after")
        last = ", ".join(f"{task} {_score(value)}" for task, value in zip(tasks, matrix[-1], strict=True))
        alt = f"Scores of {label} on each task after each task. After the last: {last}."
        yield Picture(label, plots.to_svg(figure, alt), f"learning rate {rate:g}, {_over(runs[label])}")


def _curves(runs: Runs, matrices: Mapping[str, Matrix], looks: Mapping[str, plots.Look]) -> Iterator[Picture]:
    """The score on each task over the steps, a line for each method."""
    tasks = next(iter(runs.values()))[0]["tasks"] if runs else []
    for position, task in enumerate(tasks):
        figure, (axes,) = plots.new_figure(2.3)
        axes.axvline(position + 1, color=plots.FAINT, linewidth=6, alpha=0.22)
        columns = {label: [row[position] for row in matrix] for label, matrix in matrices.items()}
        _steps(axes, len(tasks), columns, looks)
        axes.set_ylabel("score")
        ends = ", ".join(f"{label} {_score(column[-1])}" for label, column in columns.items())
        alt = f"Score on {task} over the steps. At the end: {ends}."
        yield Picture(f"{position + 1}. {task}", plots.to_svg(figure, alt), f"Means over {_over(*runs.values())}")


def _general(runs: Runs, looks: Mapping[str, plots.Look]) -> Iterator[Picture]:
    """The loss on general text over the steps."""
    series = {}
    for label, members in runs.items():
        if losses := [run["general"]["losses"] for run in members if (run.get("general") or {}).get("losses")]:
            series[label] = [_mean(step) for step in zip(*losses, strict=True)]
    if series:
        figure, (axes,) = plots.new_figure(2.6)
        _steps(axes, max(map(len, series.values())) - 1, series, looks)
        axes.set_ylabel("loss on general text, nats")
        alt = f"General loss at the end: {', '.join(f'{label} {_score(v[-1])}' for label, v in series.items())}."
        note = f"0 is before any task. Means over {_over(*(runs[label] for label in series))}."
        yield Picture("General loss over the steps", plots.to_svg(figure, alt), note)


def _steps(axes: Any, count: int, series: Mapping[str, list[float | None]], looks: Mapping[str, plots.Look]) -> None:
    """Lines over the steps 0 to ``count``; a method that trains on all tasks at once has only its end."""
    for label, values in series.items():
        steps, shown = (range(count + 1), values) if len(values) == count + 1 else ([count], values[-1:])
        plots.lines(axes, steps, {label: shown}, looks)
    axes.set_xlabel("after task")
    axes.set_xticks(range(0, count + 1, 1 if count <= 10 else 5))


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the values that are not None."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


def _mean_matrix(matrices: Sequence[Matrix]) -> Matrix:
    return [[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _over(*members: Sequence[Mapping[str, Any]]) -> str:
    """How many runs of which order."""
    return f"{counted(list(map(len, members)), 'run')}, order {members[0][0]['order']}"
