"""What a report's figures say, in sentences that claim no more than the intervals do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .contents import COMPARED, LESS_IS_BETTER, best_entries, difference_of
from .tables import signed

Name = Callable[[str], str]
LEADERS = {
    "op": "The highest OP after the last task",
    "diagonal": "Most was learned by",
    "bwt": "Least was forgotten by",
    "general": "The general loss rose least with",
}

RANKED = "Ranked are methods that train, one task after another, each at its best point."
CAUTION = (
    "Clear means that the 95 % interval of the paired difference (Student's t) leaves zero out. Each interval stands "
    "for itself; none is corrected for the number of them."
)


@dataclass(frozen=True)
class Findings:
    """Sentences.

    Args:
        rests_on: how many runs, and what they differ in.
        leaders: for each of four measures who leads, and from whom that is clearly apart.
        caution: what is ranked, and what "clearly" means.
    """

    rests_on: str
    leaders: tuple[str, ...]
    caution: str


def findings_of(report: Mapping[str, Any], name: Name = str) -> Findings:
    """What a report says.

    Only methods that learn one task after another are ranked: one that has all tasks at once cannot forget. And only
    those that train anything: a model that learns nothing forgets nothing.

    Args:
        name: how a label is written.
    """
    leaders = [sentence for measure in LEADERS if (sentence := _leader(report, measure, name))]
    return Findings(_what_it_rests_on(report), tuple(leaders), _caution(report))


def _what_it_rests_on(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    counts = {
        "method": len({run["label"] for run in runs}),
        "task": len({task for run in runs for task in run["tasks"]}),
        "learning rate": len({run["learning_rate"] for run in runs}),
        "seed": len({run["seed"] for run in runs}),
        "order": len({run["order"] for run in runs}),
    }
    parts = [_count(number, word) for word, number in counts.items()]
    return f"{_count(len(runs), 'run')}: {', '.join(parts[:-1])} and {parts[-1]}."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _leader(report: Mapping[str, Any], measure: str, name: Name) -> str | None:
    ranked = [e for e in best_entries(report) if e["diagonal"] is not None and e[measure] is not None and _trains(e)]
    if not ranked:
        return None
    sign = -1 if measure in LESS_IS_BETTER else 1
    first = max(ranked, key=lambda entry: sign * entry[measure]["mean"])
    value = first[measure]["mean"]
    figure = signed(value) if measure in ("bwt", "general") else f"{value:.3f}"
    unit = " nats" if measure == "general" else ""
    verb = " is that of" if measure == "op" else ""
    start = f"{LEADERS[measure]}{verb} {name(first['label'])} ({figure}{unit}, n\u00a0=\u00a0{first[measure]['n']})"
    others = [entry["label"] for entry in ranked if entry is not first]
    return f"{start}{_apart(report, first['label'], others, measure, name)}." if others else f"{start}."


def _trains(entry: Mapping[str, Any]) -> bool:
    parameters = entry["cost"].get("parameters")
    return parameters is None or parameters["mean"] > 0


def _apart(report: Mapping[str, Any], first: str, others: list[str], measure: str, name: Name) -> str:
    """From whom the first is clearly apart, by the paired differences."""
    sign = -1 if measure in LESS_IS_BETTER else 1
    found = {other: difference_of(report, first, other, measure) for other in others}
    if all(difference is None or difference["interval"] is None for difference in found.values()):
        return "; with fewer than two pairs of runs, no difference can be called clear"
    clear = [o for o, d in found.items() if d is not None and d["is_clear"] and sign * d["mean"] > 0]
    near = [name(other) for other in others if other not in clear]
    if not near:
        return f", clearly apart from {'the other' if len(others) == 1 else f'all {len(others)} others'}"
    if not clear:
        return ", but not clearly apart from " + ("any other" if len(others) > 3 else " or ".join(near))
    return f", clearly apart from {len(clear)} of {len(others)} others, not from {_listed(near)}"


def _listed(names: list[str], most: int = 4) -> str:
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _caution(report: Mapping[str, Any]) -> str:
    found = [entry["measures"][name] for entry in report["differences"] for name in COMPARED]
    count = sum(difference is not None and difference["interval"] is not None for difference in found)
    if not count:
        return RANKED
    return (
        f"{RANKED} {CAUTION} There are {count} in this report; about one in twenty would leave zero out by chance "
        "alone if no methods differed."
    )
