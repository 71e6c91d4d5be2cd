"""``report.md``: the tables and formulas, for a terminal or a code host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import tables
from .contents import HEADINGS, INTERVALS
from .tables import Table

TITLE = "What was learned, and what it cost"
NOTATION = "R[t,j] is the score on task j after task t of T, r0[j] that of the base model."


def markdown_of(report: Mapping[str, Any]) -> str:
    """The whole file. Labels, task names and data are escaped."""
    formulas = [f"- **{HEADINGS[name]}**: `{formula}`" for name, formula in report["measures"].items()]
    differences = tables.difference_tables(report)
    parts = [
        f"# {TITLE}",
        report["overview"],
        *(f"> **Note.** {escaped(warning)}" for warning in report["warnings"]),
        _section(tables.summary_table(report)),
        _section(tables.best_table(report), report["best"]["rule"]),
        *([f"## Paired differences\n\n{INTERVALS}"] if differences else []),
        *(_section(table, level=3) for table in differences),
        *map(_section, tables.pareto_tables(report)),
        *map(_section, tables.gate_tables(report)),
        _section(tables.cost_table(report)),
        f"## Formulas\n\n{NOTATION}",
        "\n".join(formulas),
    ]
    return "\n\n".join(parts) + "\n"


def _section(table: Table, note: str = "", level: int = 2) -> str:
    figures = len(table.headings) - table.names
    lines = [
        f"| {' | '.join(table.headings)} |",
        f"|{'|'.join([':---'] * table.names + ['---:'] * figures)}|",
        *(f"| {' | '.join(map(escaped, row))} |" for row in table.rows),
    ]
    return "\n\n".join([f"{'#' * level} {table.title}", *filter(None, (note, table.note)), "\n".join(lines)])


def escaped(text: str) -> str:
    """Text that Markdown shows literally, in a cell or a paragraph."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|&~$" else " " if c in "\r\n" else c for c in text)
