"""The figures of the HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ... import plots
from .contents import FRONTS, best_entries, counted, task_count

Report = Mapping[str, Any]
Runs = Mapping[str, list[dict[str, Any]]]


class Picture(NamedTuple):
    """A figure of the page: its title, the ``<svg>`` element, and a note with the number of runs."""

    title: str
    svg: str
    note: str


def pictures_of(report: Report) -> dict[str, list[Picture]]:
    """Section of the page -> its figures. A method looks the same in all of them.

    Matrices and curves are means over the runs of one order, that of the first run, at each method's best point.
    """
    looks = plots.looks([point["label"] for point in report["best"]["points"]])
    rates = {point["label"]: point["learning_rate"] for point in report["best"]["points"]}
    count = task_count(report["runs"])
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        is_complete = (run["order"], len(run["tasks"])) == (report["runs"][0]["order"], count)
        if is_complete and run["learning_rate"] == rates[run["label"]]:
            runs.setdefault(run["label"], []).append(run)
    with plots.style():
        return {
            "glance": list(_glance(report, looks)),
            "fronts": [_front(report, name, looks) for name, points in report["pareto"].items() if points],
            "matrices": list(_matrices(runs)),
            "general": list(_general(runs, looks)),
        }


def _glance(report: Report, looks: Mapping[str, plots.Look]) -> Iterator[Picture]:
    """The path of each method at its best rate from what it learned to what is left of it, the best on top."""
    entries = [e for e in best_entries(report["best"]["points"], report["summary"]) if e["op"] is not None]
    if not entries:
        return
    figure, (axes,) = plots.new_figure(0.75 + 0.3 * len(entries), width=4.0)
    finals = [entry["op"]["mean"] for entry in entries]
    learned = [entry["diagonal"]["mean"] if entry["diagonal"] else None for entry in entries]
    for y, (entry, before, final) in enumerate(zip(entries, learned, finals, strict=True)):
        look = looks[entry["label"]]
        is_loss = before is not None and before > final
        if before is not None:
            axes.plot([before, final], [y, y], color=look["color"], linewidth=4, alpha=0.35, solid_capstyle="butt")
            axes.plot(before, y, "|", color=look["color"], markersize=13, markeredgewidth=2)
        axes.plot(final, y, **look | {"markersize": 8})
        shift, side = (-8, "right") if is_loss else (8, "left")
        axes.annotate(f"{final:.2f}", (final, y), (shift, 0), textcoords="offset points", va="center", ha=side)
    axes.set_yticks(range(len(entries)), [plots.shortened(entry["label"]) for entry in entries])
    axes.set(xlabel="mean score over the tasks", ylim=(len(entries) - 0.5, -0.5))
    axes.margins(x=0.15)
    axes.autoscale_view()
    if min(finals) >= 0:
        axes.set_xlim(left=-0.03 * axes.get_xlim()[1])  # from zero, so that lengths can be compared
    axes.grid(axis="y", visible=False)
    ends = ", ".join(f"{entry['label']} {final:.2f}" for entry, final in zip(entries, finals, strict=True))
    note = (
        "A bar is what a method forgets: from the mean score right after each task (line) to the mean score after the "
        "last task (point)."
    )
    alt = f"Mean score after the last task: {ends}."
    yield Picture("Learned, and what is left of it", plots.to_svg(figure, alt), note)


def _front(report: Report, name: str, looks: Mapping[str, plots.Look]) -> Picture:
    """What was learned against its cost, with a line through the points that no other point dominates."""
    from adjustText import adjust_text

    points, (*_, title, cost) = report["pareto"][name], FRONTS[name]
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
    low, high = axes.get_ylim()
    if (missing := 0.1 * high - (high - low)) > 0:  # a small difference should look small
        axes.set_ylim(low - missing / 2, high + missing / 2)
    figure.draw_without_rendering()  # labels are placed in the final layout, which they must not change
    labels = [axes.text(*means[point], plots.shortened(point[0])) for point in best if point in means]
    for label in labels:
        label.set_in_layout(False)
    line = {"arrowstyle": "-", "color": plots.FAINT, "linewidth": 0.6}
    adjust_text(labels, *zip(*means.values(), strict=True), ax=axes, iter_lim=1000, expand=(1.1, 1.3), arrowprops=line)
    names = ", ".join(f"{label} at {rate:g}" for label, rate in front)
    alt = f"{title}: {len(means)} points of {len(looks)} methods. No other point dominates {names}."
    note = (
        f"Better points are further up and to the left. Each point is a mean over "
        f"{counted([point['learned']['n'] for point in points], 'run')}; bars are one standard deviation. "
        "Filled: a method's best rate. Hollow: its other rates. No point dominates those on the grey line."
    )
    return Picture(title, plots.to_svg(figure, alt), note)


def _matrices(runs: Runs) -> Iterator[Picture]:
    """The scores of each method on each task after each task, on one scale."""
    matrices = {label: _mean([[r["zero_shot"], *r["R"]] for r in members]) for label, members in runs.items()}
    values = [value for matrix in matrices.values() for value in matrix.flat]
    for label, matrix in matrices.items():
        tasks, rate = runs[label][0]["tasks"], runs[label][0]["learning_rate"]
        rows = ["zero-shot", *(tasks if len(matrix) == len(tasks) + 1 else ["all tasks"])]
        figure, (axes,) = plots.new_figure(
            plots.heat_map_height(len(matrix), tasks), max(plots.WIDTH, 0.27 * len(tasks) + 1)
        )
        plots.heat_map(axes, matrix, rows, tasks, np.nanmin(values), np.nanmax(values), has_values=True)
        axes.set(xlabel="score on", ylabel="after")
        last = ", ".join(f"{task} {value:.2f}" for task, value in zip(tasks, matrix[-1], strict=True))
        alt = f"Scores of {label} on each task after each task. After the last: {last}."
        yield Picture(label, plots.to_svg(figure, alt), f"learning rate {rate:g}, {_over(runs[label])}")


def _general(runs: Runs, looks: Mapping[str, plots.Look]) -> Iterator[Picture]:
    """The loss on general text over the steps; a method that trains on all tasks at once has only its end."""
    means = {}
    for label, members in runs.items():
        if losses := [run["general_losses"] for run in members if run.get("general_losses")]:
            means[label] = _mean(losses).tolist()
    if means:
        figure, (axes,) = plots.new_figure(2.4 + 0.1 * len(looks))
        count = max(map(len, means.values()))
        for label, values in means.items():
            steps, present = (range(count), values) if len(values) == count else ([count - 1], values[-1:])
            axes.plot(steps, present, label=plots.shortened(label, 22), **looks[label])
        axes.set(xlabel="after task", ylabel="loss on general text, nats")
        axes.locator_params(axis="x", integer=True)
        plots.legend(axes)
        alt = f"General loss at the end: {', '.join(f'{label} {values[-1]:.2f}' for label, values in means.items())}."
        note = f"0 is before any task. Means over {_over(*(runs[label] for label in means))}."
        yield Picture("General loss over the steps", plots.to_svg(figure, alt), note)


def _mean(values: Sequence[Any]) -> Any:
    """Over the runs, without missing values; an array, NaN if all are missing."""
    return np.ma.masked_invalid(np.array(values, dtype=float)).mean(axis=0).filled(np.nan)


def _over(*members: Sequence[Mapping[str, Any]]) -> str:
    """The number of runs, and their order."""
    return f"{counted(list(map(len, members)), 'run')}, order {members[0][0]['order']}"
