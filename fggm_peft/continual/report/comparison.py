"""Compares the runs of several folders: are they of the same stream, and what differs in what came out?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from ..fingerprint import differences
from ..measures import RESULT_NAMES, Measures
from .contents import COLUMNS, FORMULAS, best_points, finite, pairs_of, summarised, with_whole_measures
from .tables import HEADINGS, Table, difference_cells, shown

NEEDED = ("label", "method", "learning_rate", "seed", "order", "tasks", "R", "zero_shot", "op")


class NotComparableError(ValueError):
    """Runs that cannot be set against each other, or a folder without runs."""


@dataclass(frozen=True)
class Source:
    """The runs of one folder or ``report.json``.

    Args:
        name: as the user gave it.
        runs: results, as ``run_stream`` gives them.
        stream: fingerprint of their stream; None where there is none beside them.
    """

    name: str
    runs: list[dict[str, Any]]
    stream: dict[str, Any] | None

    @property
    def tasks(self) -> set[str]:
        return {task for run in self.runs for task in run["tasks"]}


def read_source(path: str) -> Source:
    """The runs of a folder that ``fggm sequence`` wrote, finished or not, or of its ``report.json``.

    Raises:
        NotComparableError: there are no runs, or a file does not have what a report has.
    """
    place = Path(path).expanduser()
    folder = place if place.is_dir() else place.parent
    if place.is_dir() and not (place / "report.json").exists():
        runs = [_json(file) for file in sorted(place.glob("runs/*/*/run.json"))]
    else:
        runs = _runs_of(_json(place / "report.json" if place.is_dir() else place), path)
    for run in runs:
        if not isinstance(run, dict) or (missing := [key for key in NEEDED if key not in run]):
            raise NotComparableError(
                f"{path}: a run has no {', '.join(missing) if isinstance(run, dict) else 'fields'}"
            )
    if not runs:
        raise NotComparableError(
            f"no finished run in {path}; name the output folder of fggm sequence, or its report.json"
        )
    stream = folder / "stream.json"
    return Source(path, [finite(run) for run in runs], _json(stream) if stream.exists() else None)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotComparableError(f"no file {str(file)!r}") from error
    except ValueError as error:
        raise NotComparableError(f"{file} is not JSON: {error}") from error


def _runs_of(report: Any, path: str) -> list[Any]:
    if not isinstance(report, dict) or not isinstance(report.get("runs"), list):
        raise NotComparableError(f"{path} is not a report of fggm sequence: it has no list of runs")
    return report["runs"]


def compare(sources: Sequence[Source]) -> dict[str, Any]:
    """What came out where, and the paired differences of every two sources. Plain types.

    Where two sources have labels in common, runs of the same label, learning rate, seed and order are paired, for each
    label, and for all of them together where there are several. Otherwise each label's best point is paired with each
    of the other's over seed and order. An order is the tasks in it, whatever it is called. If the sources have only
    some tasks in common, the measures are taken anew over those, and say nothing of the general loss.

    Raises:
        NotComparableError: there are not 2 to 26 sources, one is there twice, or they have no task in common.
    """
    names = [source.name for source in sources]
    if not 2 <= len(set(names)) == len(names) <= len(ascii_uppercase):
        raise NotComparableError(f"comparing needs 2 to 26 different folders or reports, got {', '.join(names)}")
    shared = _shared_tasks(sources)
    is_whole = all(source.tasks == set(shared) for source in sources)
    runs = {
        s.name: with_whole_measures(s.runs if is_whole else [_restricted(run, shared) for run in s.runs])
        for s in sources
    }
    return {
        "compared": [
            {"name": source.name, "runs": len(source.runs), "summary": summarised(runs[source.name])}
            for source in sources
        ],
        "tasks": shared,
        "streams": [
            {"a": a.name, "b": b.name, "differences": stream_difference(a, b)} for a, b in combinations(sources, 2)
        ],
        "differences": [found for a, b in combinations(names, 2) for found in _differences(a, runs[a], b, runs[b])],
        "measures": dict(FORMULAS),
        "warnings": _warnings(sources, shared, is_whole),
    }


def _shared_tasks(sources: Sequence[Source]) -> list[str]:
    shared = set.intersection(*(source.tasks for source in sources))
    if not shared:
        lists = "; ".join(f"{source.name} has {', '.join(sorted(source.tasks))}" for source in sources)
        raise NotComparableError(f"the runs are of different tasks, so no figure can be paired: {lists}")
    return [task for task in dict.fromkeys(t for run in sources[0].runs for t in run["tasks"]) if task in shared]


def _restricted(run: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The run as if only some of its tasks had been asked, each after those of them that came before it."""
    at = [position for position, task in enumerate(run["tasks"]) if task in tasks]
    found = {**run, "tasks": [run["tasks"][position] for position in at], **dict.fromkeys(COLUMNS.values())}
    if not at:  # a gate stopped it before
        return found
    if run.get("diagonal") is None:  # all tasks at once
        return {**found, "op": float(np.mean([run["R"][-1][position] for position in at]))}
    scores = np.array(run["R"], dtype=np.float64)[np.ix_(at, at)]
    measures = Measures.of(scores, [run["zero_shot"][position] for position in at])
    return {**found, **{name: getattr(measures, other) for name, other in RESULT_NAMES.items()}}


def _differences(
    a: str, a_runs: Sequence[Mapping[str, Any]], b: str, b_runs: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The pairings of two sources, each with the means of its sides and the paired difference a - b."""
    labels = [[point["label"] for point in best_points(summarised(runs))["points"]] for runs in (a_runs, b_runs)]
    shared = [label for label in labels[0] if label in labels[1]]
    if shared:
        keys = ("label", "learning_rate", "seed", "order")
        groups = [(label, label, {label}) for label in shared]
        if len(shared) > 1:
            groups.append(("all labels", "all labels", set(shared)))
        for a_label, b_label, members in groups:
            sides = [[run for run in runs if run["label"] in members] for runs in (a_runs, b_runs)]
            yield _paired(a, a_label, sides[0], b, b_label, sides[1], keys)
        return
    best = [_at_best(runs) for runs in (a_runs, b_runs)]
    for a_label, a_side in best[0].items():
        for b_label, b_side in best[1].items():
            yield _paired(a, a_label, a_side, b, b_label, b_side, ("seed", "order"))


def _at_best(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Of each label the runs at its best learning rate."""
    points = {p["label"]: p["learning_rate"] for p in best_points(summarised(runs))["points"]}
    return {label: [r for r in runs if (r["label"], r["learning_rate"]) == (label, points[label])] for label in points}


def _paired(a: str, a_label: str, a_runs, b: str, b_label: str, b_runs, keys: Sequence[str]) -> dict[str, Any]:
    a_pairs, b_pairs = ({_key(run, keys): run for run in runs} for runs in (a_runs, b_runs))
    means = [summarised([{**run, "label": "", "learning_rate": 0.0} for run in runs])[0] for runs in (a_runs, b_runs)]
    return {
        "a": {"name": a, "label": a_label, **{name: means[0][name] for name in COLUMNS.values()}},
        "b": {"name": b, "label": b_label, **{name: means[1][name] for name in COLUMNS.values()}},
        "paired_by": list(keys),
        "measures": pairs_of(a_pairs, b_pairs, COLUMNS.values()),
    }


def _key(run: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    """What a run is paired by; its order by what it is, since "given" is another one in another stream."""
    return tuple(", ".join(run["tasks"]) if key == "order" else run[key] for key in keys)


# --- streams -------------------------------------------------------------------------------------


def stream_difference(a: Source, b: Source) -> list[str] | None:
    """What differs between the streams of two sources: "training.epochs: 1, there 3"; None where it is not known."""
    if a.stream is None or b.stream is None:
        return None
    return differences(a.stream, b.stream)


def _warnings(sources: Sequence[Source], shared: Sequence[str], is_whole: bool) -> list[str]:
    found = []
    if not is_whole:
        others = [
            f"{s.name} also has {', '.join(sorted(s.tasks - set(shared)))}" for s in sources if s.tasks - set(shared)
        ]
        found.append(
            f"Not the same tasks: {'; '.join(others)}. The measures are taken over the shared ones only "
            f"({', '.join(shared)}), though each model was also trained on its own others."
        )
    for a, b in combinations(sources, 2):
        differences = stream_difference(a, b)
        if differences is None:
            found.append(
                f"{a.name} and {b.name}: there is not a stream.json beside both, so whether model, data and "
                "training are the same is not known."
            )
        elif differences:
            found.append(f"The streams of {a.name} and {b.name} differ: {'; '.join(differences)}.")
    return found


# --- tables --------------------------------------------------------------------------------------


def letters(comparison: Mapping[str, Any]) -> dict[str, str]:
    """A letter for each source, since a path is too long for a cell."""
    return dict(zip((side["name"] for side in comparison["compared"]), ascii_uppercase, strict=False))


def pairing_name(entry: Mapping[str, Any], of: Mapping[str, str]) -> str:
    """What is set against what: "fggm: A - B", or "A fggm - B sft"."""
    a, b = entry["a"], entry["b"]
    if a["label"] == b["label"]:
        return f"{a['label']}: {of[a['name']]} − {of[b['name']]}"  # noqa: RUF001
    return f"{of[a['name']]} {a['label']} − {of[b['name']]} {b['label']}"  # noqa: RUF001


def comparison_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """One table for each measure, with a row for each pairing whose sides both have it; and what was compared."""
    of = letters(comparison)
    sides = [[of[side["name"]], side["name"], str(side["runs"])] for side in comparison["compared"]]
    tables = [Table("Compared", ["", "from", "runs"], sides, names=2, note=_how_paired(comparison))]
    headings = ["", "first (n)", "second (n)", "difference", "95 % interval", "pairs", "verdict"]
    for name in COLUMNS.values():
        rows = [
            [
                pairing_name(entry, of),
                _with_n(entry["a"][name]),
                _with_n(entry["b"][name]),
                *difference_cells(entry["measures"][name]),
            ]
            for entry in comparison["differences"]
            if entry["a"][name] is not None and entry["b"][name] is not None
        ]
        if rows:
            tables.append(Table(HEADINGS[name], headings, rows))
    return tables


def _how_paired(comparison: Mapping[str, Any]) -> str:
    keys = {tuple(entry["paired_by"]) for entry in comparison["differences"]}
    parts = []
    if ("label", "learning_rate", "seed", "order") in keys:
        parts.append(
            "Methods of the same label are paired by label, learning rate, seed and order; every learning rate counts."
        )
    if ("seed", "order") in keys:
        parts.append("Methods of different labels are paired by seed and order, each at its best learning rate.")
    if any(d["unpaired"] for entry in comparison["differences"] for d in entry["measures"].values() if d is not None):
        parts.append("Means are over all runs of a side, differences over those that both have.")
    return " ".join(parts)


def _with_n(figure: Mapping[str, Any]) -> str:
    return f"{shown(figure)} ({figure['n']})"
