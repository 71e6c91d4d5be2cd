"""``report.md``: the tables and formulas, for a terminal or a code host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .contents import HEADINGS, INTERVALS
from .tables import (
    Table,
    best_table,
    cost_table,
    difference_tables,
    gate_tables,
    general_task_tables,
    pareto_table,
    summary_table,
)

NOTATION = "R[t,j] is the score on task j after task t of T, r0[j] that of the base."


def markdown_of(report: Mapping[str, Any]) -> str:
    """The whole file. What labels, tasks and data say is escaped."""
    warnings = [f"> **Note.** {escaped(warning)}\n" for warning in report["warnings"]]
    tables = [summary_table(report), best_table(report), *difference_tables(report)]
    summary, best, *differences = tables
    formulas = [f"- **{HEADINGS[name]}**: `{formula}`" for name, formula in report["measures"].items()]
    parts = [
        "# What was learned, and what it cost",
        report["overview"],
        INTERVALS,
        *warnings,
        _section(summary),
        _section(best, report["best"]["rule"]),
    ]
    if differences:
        note = "Of the best points, over the runs with the same seed and order: mean of a − b, n pairs."  # noqa: RUF001
        parts += ["## Paired differences", note, *(_section(table, level=3) for table in differences)]
    for front, title in (("forgotten", "learned against forgotten"), ("harm", "learned against general harm")):
        table = pareto_table(report, front)
        if table.rows:
            parts.append(_section(table, title=f"Pareto front: {title}"))
    parts += [_section(table) for table in (*general_task_tables(report), *gate_tables(report))]
    parts += [_section(cost_table(report)), "## Formulas", NOTATION, "\n".join(formulas)]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _section(table: Table, note: str = "", level: int = 2, title: str = "") -> str:
    left = [":---"] * table.names
    lines = [
        f"| {' | '.join(table.headings)} |",
        f"|{'|'.join(left + ['---:'] * (len(table.headings) - table.names))}|",
        *(f"| {' | '.join(map(escaped, row))} |" for row in table.rows),
    ]
    above = [f"{'#' * level} {title or table.title}", *filter(None, (note, table.note))]
    return "\n\n".join([*above, "\n".join(lines)])


def escaped(text: str) -> str:
    """Text as it is, in a cell or a paragraph of Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|&~$" else " " if c in "\r\n" else c for c in text)
