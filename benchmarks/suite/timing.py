"""Timing of several calls in turns, as tables.

One method in each table is the floor, by whose figures all others are divided. Ratios are of minima unless their name
says median. The noise of a table is the floor's median over its minimum; smaller differences between ratios mean
nothing.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from common import DEVICE, interleaved, ratios

T = TypeVar("T")
Table = dict[str, Any]
LEAST_ROUNDS, MOST_ROUNDS = 3, 25 if DEVICE.type == "cuda" else 9


def working(names: list[str], build: Callable[[str], T]) -> tuple[dict[str, T], dict[str, str]]:
    """What ``build`` returns for each name, and the tracebacks of those that fail, so that the others are measured."""
    built, failed = {}, {}
    for name in names:
        try:
            built[name] = build(name)
        except Exception:
            failed[name] = traceback.format_exc()
            if "CUDA error" in failed[name]:  # no later call of this process can work
                raise
    return built, failed


def timed(calls: dict[str, Callable[[], Any]], floor: str, seconds: float) -> Table:
    """Rows of ratios over ``floor``: one warm-up round, then as many interleaved rounds as fit into ``seconds``."""
    start = time.perf_counter()
    interleaved(calls, 1, warm_up=0)
    once = time.perf_counter() - start
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(seconds / once)))
    rows = ratios(interleaved(calls, rounds, warm_up=0), floor)
    noise = rows.pop("noise")["floor_median_over_min"]
    return {"floor": floor, "noise": noise, "rounds": rounds, "rows": rows}


def add_ratios_(table: Table, figure: str) -> None:
    """Add the ratio of a figure over that of the floor to each row."""
    rows = table["rows"]
    for row in rows.values():
        if figure in row and rows[table["floor"]].get(figure):
            row[f"{figure}_ratio"] = row[figure] / rows[table["floor"]][figure]
