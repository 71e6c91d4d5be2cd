#!/usr/bin/env python
"""Writes the tables and the figure of docs/study.md, and the claim of README.md, from the runs in results/retention.

    python benchmarks/study/page.py [--check]

``--check`` writes nothing and fails if the pages do not show the committed runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fggm_peft import plots
from fggm_peft.continual.measures import fixed, signed, summary_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retention"
PAGE, FIGURE, README = ROOT / "docs" / "study.md", ROOT / "docs" / "study.png", ROOT / "README.md"
STREAMS = ("code", "intents", "generation", "mixed")
OURS = ("retain", "retain-10%", "decay-all")
WITH_OLD_DATA = ("replay-1%", "replay-10%", "multitask")
Run = dict[str, Any]


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    arguments = parser.parse_args()
    for path, text in pages().items():
        if arguments.check and text != path.read_text("utf-8"):
            sys.exit(f"{path.name} is out of date; run {Path(__file__).name}")
        path.write_text(text, "utf-8")
    if not arguments.check:
        draw(finished())


def pages() -> dict[Path, str]:
    """The text of both pages, from the committed runs."""
    streams = finished()
    return {
        PAGE: with_parts(PAGE.read_text("utf-8"), parts_of(streams)),
        README: with_parts(README.read_text("utf-8"), {"claim": claim(streams), "methods": methods_table(streams)}),
    }


def finished() -> dict[str, list[Run]]:
    """The runs of each stream that has some."""
    return {stream: runs for stream in STREAMS if (runs := runs_of(stream))}


def runs_of(stream: str) -> list[Run]:
    """The finished runs of a stream, in the order of the methods in its file."""
    file = Path(__file__).parent / f"{'' if stream == 'tuning' else 'retention-'}{stream}.yaml"
    methods = yaml.safe_load(file.read_text())["methods"]
    labels = [m if isinstance(m, str) else m.get("label", m["name"]) for m in methods]
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / stream).glob("runs/*/*/run.json"))]
    return sorted(runs, key=lambda run: (labels.index(run["label"]), run["learning_rate"], run["seed"], run["order"]))


def with_parts(page: str, parts: dict[str, str]) -> str:
    """The page with new text between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    for name, text in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"a page needs <!-- {name} --> and <!-- /{name} --> once")
    return page


def parts_of(streams: dict[str, list[Run]]) -> dict[str, str]:
    """The generated parts of the page."""
    sections = [f"### {name}\n\n{stream_table(runs)}" for name, runs in streams.items()]
    return {"targets": targets(streams), "streams": "\n\n".join(sections), "tuning": tuning_table(runs_of("tuning"))}


# --- tables --------------------------------------------------------------------------------------


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def labels_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run["label"] for run in runs))


def values(runs: Iterable[Run], measure: str, **where: Any) -> list[float]:
    own = (run for run in runs if all(run[key] == value for key, value in where.items()))
    return [run[measure] for run in own if run.get(measure) is not None]


def mean(numbers: Sequence[float], form: str = ".3f") -> str:
    return f"{sum(numbers) / len(numbers):{form}}" if numbers else ""


def stream_table(runs: Sequence[Run]) -> str:
    """One row for each method."""
    headings = ["method", "rate", "runs", "OP, given", "OP, reversed", "learned", "BWT", "general, nats", "worst"]
    headings += ["other text", "KL", "right → wrong", "minutes", "kept MB", "OP: `retain` − this"]  # noqa: RUF001
    rows = []
    for label in labels_of(runs):
        own = [run for run in runs if run["label"] == label]
        changed = [sum(task["lost"] for task in (run.get("changed") or {}).values()) for run in own]
        minutes = [(run["cost"]["selection_seconds"] + run["cost"]["training_seconds"]) / 60 for run in own]
        kept = [run["cost"].get("kept_bytes", 0) / 1e6 for run in own]
        rows.append(
            [
                f"**{label}**" if label in OURS else label,
                f"{own[0]['learning_rate']:g}",
                str(len(own)),
                *(mean(values(own, "op", order=order)) for order in ("given", "reversed")),
                mean(values(own, "diagonal")),
                *(mean(values(own, measure), "+.3f") for measure in ("bwt", "general", "general_worst", "other")),
                mean(values(own, "kl"), ".2f"),
                mean(changed, ".0f"),
                mean(minutes, ".1f"),
                mean(kept, ".1f"),
                difference(runs, "retain", label),
            ]
        )
    return table(headings, rows)


def paired(runs: Iterable[Run], a: str, b: str) -> list[tuple[Run, Run]]:
    """The runs of two methods on one stream with the same seed and order."""
    first, second = ({(r["seed"], r["order"]): r for r in runs if r["label"] == label} for label in (a, b))
    return [(first[key], second[key]) for key in first if key in second]


def difference(runs: Sequence[Run], a: str, b: str) -> str:
    """The mean difference in OP over the runs with the same seed and order, with its 95 % interval."""
    summary = summary_of(one["op"] - other["op"] for one, other in paired(runs, a, b)) if a != b else None
    if summary is None:
        return ""
    interval = "" if summary["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*summary["interval"])
    return f"{summary['mean']:+.3f}{interval}"


def targets(streams: dict[str, list[Run]]) -> str:
    """Whether our methods reach the targets, stream by stream."""
    rows = []
    for stream, runs in streams.items():
        for label in [label for label in labels_of(runs) if label in OURS]:
            own = [run for run in runs if run["label"] == label]
            limit = -0.04 if len(own[0]["tasks"]) >= 8 else -0.02
            rows.append(
                [
                    stream,
                    label,
                    *(
                        judged(value, is_met)
                        for value, is_met in (
                            (gap(runs, label, "sft", "diagonal"), lambda x: x >= -0.01),
                            (average(own, "bwt"), lambda x, limit=limit: x >= limit),
                            (average(own, "general"), lambda x: x <= 0.03),
                            (average(own, "other"), lambda x: x <= 0.05),
                            (lead(runs, label), lambda x: x > 0),
                        )
                    ),
                ]
            )
    headings = ["stream", "method", "learned − full fine-tuning (≥ −.01)", "BWT (≥ −.02; 8 tasks −.04)"]  # noqa: RUF001
    headings += ["general, nats (≤ .03)", "other text (≤ .05)", "OP − best other without old data, worst order (> 0)"]  # noqa: RUF001
    return table(headings, rows)


def judged(value: float | None, is_met: Callable[[float], bool]) -> str:
    return "" if value is None else f"{fixed(value, '+.3f')} {'✓' if is_met(value) else '✗'}"


def average(runs: Sequence[Run], measure: str) -> float | None:
    numbers = values(runs, measure)
    return sum(numbers) / len(numbers) if numbers else None


def gap(runs: Sequence[Run], a: str, b: str, measure: str) -> float | None:
    """The mean of ``a`` minus the mean of ``b`` over the runs with the same seed and order; None without any."""
    differences = [one[measure] - other[measure] for one, other in paired(runs, a, b)]
    return sum(differences) / len(differences) if differences else None


def lead(runs: Sequence[Run], label: str) -> float | None:
    """The lead in OP over the best other method without old data (or with 1 % of it), in the worst order."""
    others = [b for b in labels_of(runs) if b not in OURS and b not in set(WITH_OLD_DATA) - {"replay-1%"}]
    orders = [[run for run in runs if run["order"] == order] for order in ("given", "reversed")]
    leads = [gap(own, label, b, "op") for b in others for own in orders]
    return min((x for x in leads if x is not None), default=None)


def tuning_table(runs: Sequence[Run]) -> str:
    """OP and general loss of each method at each rate on the tuning stream."""
    rows = [
        [
            run["label"],
            f"{run['learning_rate']:g}",
            f"{run['op']:.3f}",
            f"{run['diagonal']:.3f}",
            f"{run['general']:+.3f}",
        ]
        for run in runs
    ]
    return table(["method", "rate", "OP", "learned", "general, nats"], rows)


# --- README --------------------------------------------------------------------------------------


def claim(streams: dict[str, list[Run]]) -> str:
    """One sentence that compares ``retain`` with full fine-tuning."""
    pairs = [pair for runs in streams.values() for pair in paired(runs, "retain", "sft")]
    ours, theirs = zip(*pairs, strict=True)
    op, general = ([average(own, measure) or 0.0 for own in (ours, theirs)] for measure in ("op", "general"))
    sizes = sorted({len(run["tasks"]) for run in ours})
    tasks = f"{sizes[0]} tasks" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} tasks"
    names = [name for name, runs in streams.items() if paired(runs, "retain", "sft")]
    return (
        f"On {len(names)} streams of {tasks} (SmolLM2-135M, 80 steps per task, {len(pairs)} runs), "
        f'`preset="retain"` ended with a mean score of **{op[0]:.2f}** on all tasks, and full fine-tuning at its best '
        f"learning rate with **{op[1]:.2f}**. The loss on general text changed by {signed(general[0])} and "
        f"{signed(general[1])} nats ([docs/study.md](docs/study.md))."
    )


def methods_table(streams: dict[str, list[Run]]) -> str:
    """Each method beside ``retain``, in the runs that both have."""
    rows = []
    for label in dict.fromkeys(label for runs in streams.values() for label in labels_of(runs) if label != "retain"):
        if pairs := [pair for runs in streams.values() for pair in paired(runs, "retain", label)]:
            both = list(zip(*pairs, strict=True))
            measures = [("op", ".3f"), ("diagonal", ".3f"), ("bwt", "+.3f"), ("general", "+.3f"), ("other", "+.3f")]
            cells = [" / ".join(mean(values(own, name), form) for own in both) for name, form in measures]
            rows.append([f"`{label}`", str(len(pairs)), *cells])
    headings = [
        "method",
        "runs",
        "final score: `retain` / method",
        "learned",
        "BWT",
        "general text, nats",
        "other text",
    ]
    return table(headings, rows)


# --- figure --------------------------------------------------------------------------------------


@plots.style()
def draw(streams: dict[str, list[Run]]) -> None:
    """How far the mean score of each method falls from right after each task to the end, stream by stream."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    widths = [1 + len(labels_of(runs)) for runs in streams.values()]
    figure = Figure(figsize=(0.9 * sum(widths), 3.2), layout="constrained")
    panels = figure.subplots(1, len(streams), squeeze=False, sharey=True, width_ratios=widths).flat
    looks = plots.looks(list(dict.fromkeys(label for runs in streams.values() for label in labels_of(runs))))
    for axes, (name, runs) in zip(panels, streams.items(), strict=True):
        ticks = []
        for x, label in enumerate(labels_of(runs)):
            own = [run for run in runs if run["label"] == label]
            learned, final, worst = (average(own, measure) or 0.0 for measure in ("diagonal", "op", "general_worst"))
            color, size = looks[label]["color"], 9
            axes.plot([x, x], [learned, final], color=color, linewidth=4, alpha=0.35, solid_capstyle="butt")
            axes.plot(x, learned, "_", color=color, markersize=18, markeredgewidth=2)
            axes.plot(x, final, "o", color=color, markersize=size)
            axes.annotate(f"{final:.2f}", (x, final), (10, -3), textcoords="offset points", color=color)
            ticks.append(f"{label}\n{worst:+.2f} nats")
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(title=name, xlim=(-0.6, len(ticks) - 0.2), ylim=(0, 1.05))
        axes.grid(axis="x", visible=False)
    figure.axes[0].set_ylabel("mean score over the tasks")
    marks = {"right after each task": ("_", 14), "after the last task": ("o", 8)}
    handles = [
        Line2D([], [], marker=m, color=plots.INK, linestyle="none", markersize=s, markeredgewidth=2)
        for m, s in marks.values()
    ]
    figure.legend(handles, list(marks), loc="outside upper right", ncols=2)
    plots.save(figure, FIGURE)


if __name__ == "__main__":
    main()
