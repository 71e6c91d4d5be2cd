"""Compare two results of the suite, and list what became slower or larger. Ratios are compared instead of seconds.

A time is worse if its ratio over the floor of its table grew by more than the tolerance plus the noise of both tables.
Memory and file sizes have no noise and a separate tolerance. Measurements in only one of the files are listed. Exits
with 1 if something is worse, and with 2 if the files have nothing in common.

python benchmarks/regression.py OLD.json NEW.json [--tolerance 0.05] [--size-tolerance 0.02]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("ratio_min",)
SIZES = ("peak_mib_ratio", "bytes_per_value_ratio", "over_bound")
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """A ratio in both files, and the growth up to which it does not count as worse."""

    where: str
    method: str
    figure: str
    old: float
    new: float
    allowed: float

    @property
    def growth(self) -> float:
        return self.new / self.old - 1

    @property
    def is_worse(self) -> bool:
        return self.growth > self.allowed

    def __str__(self) -> str:
        change = f"{self.old:.3f} -> {self.new:.3f} ({self.growth:+.1%}, {self.allowed:.1%} allowed)"
        return f"{self.where}: {self.method}, {self.figure}: {change}"


def changes(old: Results, new: Results, tolerance: float, size_tolerance: float) -> Iterator[Change]:
    """Every ratio in both files, except those of the floor, which are 1."""
    for where in old.keys() & new.keys():
        before, after = old[where], new[where]
        noise = before["noise"] - 1 + after["noise"] - 1
        for method in before["rows"].keys() & after["rows"].keys():
            for figure in (*TIMES, *SIZES):
                a, b = before["rows"][method].get(figure), after["rows"][method].get(figure)
                if a is None or b is None or (method == before["floor"] and figure != "over_bound"):
                    continue
                allowed = tolerance + noise if figure in TIMES else size_tolerance
                yield Change(where, method, figure, a, b, allowed)


def rows_of(results: Results) -> set[tuple[str, str]]:
    return {(where, method) for where, table in results.items() for method in table["rows"]}


def compare(old: Results, new: Results, tolerance: float = 0.05, size_tolerance: float = 0.02) -> tuple[int, list[str]]:
    """Exit status and lines to print."""
    ratios = list(changes(old, new, tolerance, size_tolerance))
    if not ratios:
        return 2, ["the files have no ratio in common"]
    worse = sorted((change for change in ratios if change.is_worse), key=lambda change: -change.growth)
    lines = [f"worse: {change}" for change in worse]
    lines += [f"not measured any more: {where}: {method}" for where, method in sorted(rows_of(old) - rows_of(new))]
    lines += [f"new: {where}: {method}" for where, method in sorted(rows_of(new) - rows_of(old))]
    lines.append(f"{len(ratios)} ratios compared, {len(worse)} worse")
    return (1 if worse else 0), lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="allowed growth of a time, beyond the noise")
    parser.add_argument("--size-tolerance", type=float, default=0.02, help="allowed growth of memory and file sizes")
    arguments = parser.parse_args()
    old, new = (json.loads(path.read_text())["results"] for path in (arguments.old, arguments.new))
    status, lines = compare(old, new, arguments.tolerance, arguments.size_tolerance)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
