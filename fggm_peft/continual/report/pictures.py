"""The pictures of a report: which figures go into which plot, and what it shows in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...plots import (
    FAINT,
    Look,
    Spot,
    bars,
    heat_map,
    heat_map_height,
    intervals,
    lines,
    looks,
    new_figure,
    points,
    titles,
    to_svg,
)
from ...selection_plots import overlap_picture
from .contents import COMPARED, LESS_IS_BETTER, best_entries, difference_of, mean_of, runs_at
from .tables import HEADINGS, PHASES, UNITS, signed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Grid = list[list[float | None]]


@dataclass(frozen=True)
class Picture:
    """A picture for the page.

    Args:
        title: above it.
        svg: the element.
        note: below it, with the number of runs.
    """

    title: str
    svg: str
    note: str = ""


@dataclass
class Pictures:
    """Draws the pictures of one report; each label looks the same in all of them."""

    report: Mapping[str, Any]
    looks: dict[str, Look] = field(init=False)
    drawn: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.labels = [point["label"] for point in self.report["best"]["points"]]
        self.looks = looks(self.labels)
        # rows and columns of a matrix are tasks in the order of training: only runs of one order have a mean
        self.order = self.report["runs"][0]["order"] if self.report["runs"] else ""

    def _picture(self, figure: Figure, title: str, alt: str, note: str = "") -> Picture:
        self.drawn += 1
        return Picture(title, to_svg(figure, f"picture{self.drawn}", alt), note)

    def _best_runs(self, label: str) -> list[dict[str, Any]]:
        """The runs of a label at its best rate, of the order that matrices are shown for, that learned all tasks."""
        count = max(len(run["tasks"]) for run in self.report["runs"])
        (point,) = (point for point in self.report["best"]["points"] if point["label"] == label)
        return [
            run
            for run in runs_at(self.report, label, point["learning_rate"])
            if (run["order"], len(run["tasks"])) == (self.order, count)
        ]

    def swatches(self) -> list[Picture]:
        """A piece of each label's line, as a legend."""
        return [Picture(label, self._swatch(label)) for label in self.labels]

    def _swatch(self, label: str) -> str:
        figure, (axes,) = new_figure(0.18, width=0.42)
        axes.set_axis_off()
        lines(axes, [0, 1, 2], {label: [None, 0.0, None]}, self.looks)
        axes.plot([0, 2], [0, 0], color=self.looks[label].color, linestyle=self.looks[label].line, linewidth=1.3)
        axes.set_xlim(-0.1, 2.1)
        self.drawn += 1
        return to_svg(figure, f"picture{self.drawn}", f"line of {label}")

    # --- points ----------------------------------------------------------------------------------

    def fronts(self) -> Iterator[Picture]:
        """Learned against forgotten, and against general harm."""
        axes = {"forgotten": "forgotten: −BWT", "harm": "rise of the general loss, nats"}  # noqa: RUF001
        titled = {"forgotten": "Learned against forgotten", "harm": "Learned against general harm"}
        for name, found in self.report["pareto"].items():
            if found["points"]:
                yield self._front(found, titled[name], axes[name])

    def _front(self, found: Mapping[str, Any], title: str, cost: str) -> Picture:
        best = {(point["label"], point["learning_rate"]) for point in self.report["best"]["points"]}
        front = [(point["label"], point["learning_rate"]) for point in found["all"]]
        spots = [self._spot(point, best) for point in found["points"]]
        corners = [
            (p["cost"]["mean"], p["learned"]["mean"])
            for p in found["points"]
            if (p["label"], p["learning_rate"]) in front
        ]
        figure, (axes,) = new_figure(3.4, width=4.0)
        titles(axes, x=f"{cost} (less is better)", y="learned: mean R[t,t]")
        points(axes, spots, corners)
        names = ", ".join(f"{label} at {rate:g}" for label, rate in front)
        alt = f"{title}: {len(spots)} points of {len(found['labels'])} methods. Not beaten by any other: {names}."
        counts = sorted({point["learned"]["n"] for point in found["points"]})
        note = (
            f"Up and left is better. Each point is a mean over {_range(counts)}, bars are one standard deviation. "
            "Full: a method's best rate; hollow: its other rates. The grey line joins what no other point beats."
        )
        return self._picture(figure, title, alt, note)

    def _spot(self, point: Mapping[str, Any], best: set[tuple[str, float]]) -> Spot:
        is_best = (point["label"], point["learning_rate"]) in best
        return Spot(
            x=point["cost"]["mean"],
            y=point["learned"]["mean"],
            look=self.looks[point["label"]],
            name=point["label"] if is_best else "",
            spread=(point["cost"]["std"], point["learned"]["std"]),
            is_full=is_best,
        )

    def differences(self) -> Iterator[Picture]:
        """Of each measure the paired differences to one label, that with the highest OP of those that have it."""
        for measure in COMPARED:
            ranked = [e for e in best_entries(self.report) if e[measure] is not None]
            if len(ranked) < 2:
                continue
            one_by_one = [e for e in ranked if e["diagonal"] is not None] or ranked
            reference = max(one_by_one, key=lambda entry: entry["op"]["mean"])["label"]
            found = [(e["label"], difference_of(self.report, e["label"], reference, measure)) for e in ranked]
            known = [(label, d) for label, d in found if label != reference and d is not None]
            if known:
                yield self._intervals(measure, reference, known)

    def _intervals(self, measure: str, reference: str, known: list[tuple[str, dict[str, Any]]]) -> Picture:
        title = f"{HEADINGS[measure]}: difference to {reference}"
        self.drawn += 1
        return _interval_picture(measure, title, known, f"picture{self.drawn}")

    # --- matrices --------------------------------------------------------------------------------

    def score_matrices(self) -> Iterator[Picture]:
        """R of each label, with the scores before anything was learned on top; all on one scale."""
        found = {label: _score_matrix(runs) for label in self.labels if (runs := self._best_runs(label))}
        known = [value for matrix in found.values() for row in matrix for value in row if value is not None]
        for label, matrix in found.items():
            runs = self._best_runs(label)
            tasks = runs[0]["tasks"]
            rows = ["zero-shot", *(tasks if len(matrix) > 2 or len(tasks) == 1 else ["all tasks"])][: len(matrix)]
            figure, (axes,) = new_figure(heat_map_height(len(matrix), tasks))
            heat_map(axes, matrix, rows, tasks, min(known), max(known))
            titles(axes, x="score on", y="after")
            last = ", ".join(f"{task} {_score(value)}" for task, value in zip(tasks, matrix[-1], strict=True))
            rate = f"learning rate {runs[0]['learning_rate']:g}"
            note = f"{rate}, {_count(len(runs), 'run')}, order {self.order}"
            yield self._picture(
                figure, label, f"Scores of {label} on each task after each. After the last: {last}.", note
            )

    def overlaps(self) -> Iterator[Picture]:
        """How much the supports of two tasks' deltas share, and what chance would give."""
        for label in self.labels:
            runs = [run for run in self._best_runs(label) if run.get("overlap")]
            if not runs:
                continue
            shared, chance = (_mean_matrix([run["overlap"][key] for run in runs]) for key in ("jaccard", "chance"))
            tasks = runs[0]["tasks"]
            figure = overlap_picture(tasks, shared, chance)
            pairs = [v for i, row in enumerate(shared) for v in row[:i] if v is not None]
            least = f" Between {min(pairs):.2f} and {max(pairs):.2f} for two different tasks." if pairs else ""
            note = (
                "Below the diagonal the Jaccard index of the supports, above it what chance would give; "
                f"{_count(len(runs), 'run')}, order {self.order}"
            )
            yield self._picture(figure, label, f"Overlap of the tasks' supports with {label}.{least}", note)

    # --- over the steps --------------------------------------------------------------------------

    def curves(self) -> Iterator[Picture]:
        """The score of each task over the steps, a line for each label."""
        matrices = {label: _score_matrix(runs) for label in self.labels if (runs := self._best_runs(label))}
        runs = [run for label in matrices for run in self._best_runs(label)]
        tasks = runs[0]["tasks"] if runs else []
        known = [value for matrix in matrices.values() for row in matrix for value in row if value is not None]
        for position, task in enumerate(tasks):
            figure, (axes,) = new_figure(2.3)
            axes.axvline(position + 1, color=FAINT, linewidth=6, alpha=0.22)
            for label, matrix in matrices.items():
                column = [row[position] for row in matrix]
                if len(matrix) == len(tasks) + 1:
                    lines(axes, range(len(matrix)), {label: column}, self.looks)
                else:  # all tasks at once: there is only an end
                    lines(axes, [len(tasks)], {label: column[-1:]}, self.looks)
            _steps(axes, len(tasks))
            room = 0.04 * (max(known) - min(known) or 1)
            axes.set_ylim(min(known) - room, max(known) + room)
            titles(axes, x="after task", y="score")
            ends = ", ".join(f"{label} {_score(matrix[-1][position])}" for label, matrix in matrices.items())
            title = f"{position + 1}. {task}"
            counts = _range(sorted({len(self._best_runs(label)) for label in matrices}))
            alt = f"Score on {task} over the steps. At the end: {ends}."
            yield self._picture(figure, title, alt, f"Means over {counts} of each method, order {self.order}")

    def general_curve(self) -> Iterator[Picture]:
        """The loss on general text over the steps, at the best points."""
        series: dict[str, list[float | None]] = {}
        for label in self.labels:
            found = [(run.get("general") or {}).get("losses") for run in self._best_runs(label)]
            losses = [values for values in found if values]
            if losses:
                series[label] = [mean_of(values) for values in zip(*losses, strict=True)]
        if not series:
            return
        steps = max(map(len, series.values())) - 1
        figure, (axes,) = new_figure(2.6)
        for label, values in series.items():
            places = range(steps + 1) if len(values) == steps + 1 else [0, steps][: len(values)]
            lines(axes, places, {label: values}, self.looks)
        _steps(axes, steps)
        titles(axes, x="after task", y="loss on general text, nats")
        ends = ", ".join(f"{label} {_score(values[-1])}" for label, values in series.items())
        counts = sorted({len(self._best_runs(label)) for label in series})
        note = f"0 is before any task. Means over {_range(counts)}, order {self.order}."
        yield self._picture(figure, "General loss over the steps", f"General loss at the end: {ends}.", note)

    # --- cost ------------------------------------------------------------------------------------

    def costs(self) -> Iterator[Picture]:
        """Bars of seconds, peak memory, trainable values and bytes, at the best points."""
        costs = {entry["label"]: entry["cost"] for entry in best_entries(self.report)}
        counts = _range(sorted({entry["runs"] for entry in best_entries(self.report)}))
        seconds = {phase: [_mean(cost.get(f"{phase}_seconds")) for cost in costs.values()] for phase in PHASES}
        memory = {phase: [_mean((c.get("peak_memory") or {}).get(phase)) for c in costs.values()] for phase in PHASES}
        kinds = [
            ("Time of a run", *_scaled(seconds, _TIMES), True),
            ("Peak memory", *_scaled(memory, _BYTES), False),
            ("Trainable values", *_scaled(_of_all(costs, "parameters"), _COUNTS), False),
            ("Saved", *_scaled(_of_all(costs, "bytes"), _BYTES), False),
        ]
        for title, parts, unit, stacked in kinds:
            used = {part: values for part, values in parts.items() if any(value is not None for value in values)}
            if not used:
                continue
            row = 0.24 if stacked or len(used) == 1 else 0.36
            figure, (axes,) = new_figure(0.8 + row * len(costs))
            bars(axes, list(costs), used, stacked)
            titles(axes, x=unit)
            most = sum if stacked else max
            figures = [most(values[n] or 0 for values in used.values()) for n in range(len(costs))]
            texts = [f"{label} {value:.3g}" for label, value in zip(costs, figures, strict=True)]
            note = f"Means over {counts}, each method at its best rate."
            yield self._picture(figure, title, f"{title} ({unit}): {', '.join(texts)}.", note)


# --- figures -------------------------------------------------------------------------------------

_TIMES = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
_BYTES = tuple((unit, 1024.0**power) for power, unit in enumerate(UNITS))
_COUNTS = (("values", 1.0), ("thousands", 1e3), ("millions", 1e6), ("billions", 1e9))


def _of_all(costs: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, list[float | None]]:
    """One part without a name: a figure of every label."""
    return {"": [_mean(cost.get(key)) for cost in costs.values()]}


def _scaled(
    parts: Mapping[str, Sequence[float | None]], units: Sequence[tuple[str, float]]
) -> tuple[dict[str, list[float | None]], str]:
    """The values in the largest unit that the greatest of them has at least one of."""
    highest = max((value for values in parts.values() for value in values if value is not None), default=0.0)
    unit, size = next((found for found in reversed(units) if highest >= found[1]), units[0])
    return {part: [None if v is None else v / size for v in values] for part, values in parts.items()}, unit


def _interval_picture(measure: str, title: str, known: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> Picture:
    """Differences to zero, one row for each, in the order given."""
    figure, (axes,) = new_figure(0.75 + 0.22 * len(known))
    ends = [None if d["interval"] is None else tuple(d["interval"]) for _, d in known]
    intervals(
        axes, [label for label, _ in known], [d["mean"] for _, d in known], ends, [d["is_clear"] for _, d in known]
    )
    better = "less" if measure in LESS_IS_BETTER else "more"
    titles(axes, x=f"difference ({better} is better)")
    texts = [f"{label} {signed(d['mean'])}{' (clear)' if d['is_clear'] else ''}" for label, d in known]
    counts = sorted({d["n"] for _, d in known})
    bars_are = "bars are 95 % intervals, dark where zero is left out" if any(ends) else "no interval of one pair"
    note = f"{_range(counts, 'pair')}; {bars_are}."
    return Picture(title, to_svg(figure, name, f"{title}: {', '.join(texts)}."), note)


def _score_matrix(runs: Sequence[Mapping[str, Any]]) -> Grid:
    """Means over runs ``[1 + steps][tasks]``, the zero-shot scores first."""
    return _mean_matrix([[run["zero_shot"], *run["R"]] for run in runs])


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float | None]]]) -> Grid:
    return [[mean_of(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _steps(axes: Any, tasks: int) -> None:
    axes.set_xlim(-0.3, tasks + 0.3)
    axes.set_xticks(range(0, tasks + 1, 1 if tasks <= 10 else 5))


def _mean(figure: Mapping[str, Any] | None) -> float | None:
    return None if figure is None else figure["mean"]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _range(counts: Sequence[int], word: str = "run") -> str:
    return _count(counts[0], word) if len(counts) == 1 else f"{counts[0]} to {_count(counts[-1], word)}"
