"""The run as one picture: what was scored when, what learning cost, and what was forgotten."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
from learning import Course, Run
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from measures import MEASURE, general_changes, score_matrix

COLORS = ("#0b7a75", "#d1495b", "#8d99ae", "#edae49")
INK, FAINT = "#22223b", "#9a9aa8"
PALE_TO_DEEP = LinearSegmentedColormap.from_list("", ("#f6f5f0", "#a9c9dd", "#3d6d9e", "#1d3557"))
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(path: Path, runs: list[Run], course: Course, model: str) -> None:
    """Draw heat maps of all methods above, learned-versus-harmed and forgetting below."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(max(11.5, 4.1 * len(runs)), 8.6), layout="constrained")
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04, h_pad=0.08, w_pad=0.08)
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.15))
        figure.suptitle(
            f"{', then '.join(task.name for task in course.tasks)}  —  {model}, seed {course.seed}",
            fontsize=13,
            fontweight="bold",
        )
        _draw_heat_maps(upper, runs, course)
        left, right = lower.subplots(1, 2, width_ratios=(1.0, 1.1))
        _draw_learned_versus_harmed(left, runs)
        _draw_forgetting(right, runs, course)
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)


def _draw_heat_maps(figure: Figure, runs: list[Run], course: Course) -> None:
    names = [task.name for task in course.tasks]
    highest = max(score_matrix(run).max() for run in runs) or 1.0
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, run, color in zip(axes, runs, COLORS, strict=False):
        matrix = score_matrix(run)
        image = axis.imshow(matrix, cmap=PALE_TO_DEEP, vmin=0, vmax=highest, aspect="auto")
        for (row, column), score in np.ndenumerate(matrix):
            was_just_learned = row == column + 1
            axis.text(
                column,
                row,
                f"{score:.2f}",
                ha="center",
                va="center",
                color="white" if score > 0.6 * highest else INK,
                fontweight="bold" if was_just_learned else "normal",
            )
            if was_just_learned:
                corner = (column - 0.47, row - 0.46)
                axis.add_patch(plt.Rectangle(corner, 0.94, 0.92, fill=False, ec=color, lw=2.5))
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names) + 1), ["base"] + [f"after {name}" for name in names])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        final = MEASURE["final"].show(run)
        forgetting = MEASURE["forgetting_score"].show(run)
        axis.set_title(f"{run.label}, rate {run.learning_rate:g}\nOP {final}   BWT {forgetting}", color=color)
        if run is not runs[0]:
            axis.set_yticklabels([])
    figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01, label="score on the task")


def _draw_learned_versus_harmed(axis: Axes, runs: list[Run]) -> None:
    for run, color in zip(runs, COLORS, strict=False):
        harm, learned = general_changes(run), score_matrix(run).mean(1)
        axis.plot(harm, learned, "-", color=color, lw=1.6, alpha=0.6, zorder=2)
        axis.scatter(harm[1:], learned[1:], s=210, color=color, zorder=3, label=run.label)
        for step, (x, y) in enumerate(zip(harm[1:], learned[1:], strict=True), start=1):
            axis.text(x, y, str(step), color="white", ha="center", va="center", zorder=4, weight="bold")
    start = score_matrix(runs[0])[0].mean()
    axis.scatter([0], [start], marker="*", s=240, color=INK, zorder=5, label="base model")
    axis.axvline(0, color=FAINT, lw=0.8, ls=":")
    axis.margins(0.12)
    axis.set_title("Learned (up) versus harmed (right), after task 1, 2, 3")
    axis.set_xlabel("change of the loss on general text (nats; right is worse)")
    axis.set_ylabel("mean score of all tasks")
    axis.legend(frameon=False, loc="best", markerscale=0.6)


def _draw_forgetting(axis: Axes, runs: list[Run], course: Course) -> None:
    width = 0.8 / len(runs)
    for place, (run, color) in enumerate(zip(runs, COLORS, strict=False)):
        matrix = score_matrix(run)
        learned = np.diag(matrix[1:])
        x = np.arange(len(course.tasks)) + (place + 0.5) * width - 0.4
        axis.bar(x, matrix[-1], 0.86 * width, color=color, label=run.label)
        axis.bar(x, learned, 0.86 * width, fill=False, edgecolor=INK, lw=1.0, ls="--")
        for left, before, after in zip(x, learned, matrix[-1], strict=True):
            if abs(after - before) > 1e-9:
                axis.text(
                    left,
                    max(before, after) + 0.012,
                    f"{after - before:+.2f}",
                    ha="center",
                    fontsize=9,
                    color=color,
                )
    for position, base in enumerate(score_matrix(runs[0])[0]):
        axis.hlines(base, position - 0.45, position + 0.45, color=INK, lw=1.4, zorder=4)
    axis.set_xticks(range(len(course.tasks)), [task.name for task in course.tasks])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("score")
    axis.set_title("Kept: at the end (filled), just learned (dashed), base (line)")
    axis.legend(frameon=False, loc="upper right")
    axis.margins(y=0.16)
