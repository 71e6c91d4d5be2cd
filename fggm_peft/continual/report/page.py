"""``report.html``: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .contents import HEADINGS, INTERVALS
from .drawing import legend_of, pictures_of
from .markdown import NOTATION
from .tables import (
    best_table,
    cost_table,
    difference_tables,
    gate_tables,
    general_task_tables,
    pareto_table,
    summary_table,
)


def page_of(report: Mapping[str, Any]) -> str:
    """The page of a report, of ``report_of`` or of a ``report.json``."""
    return rendered(
        "report.html",
        title="What was learned, and what it cost",
        report=report,
        intervals=INTERVALS,
        legend=legend_of(report),
        pictures=pictures_of(report),
        front_tables=[table for name in report["pareto"] if (table := pareto_table(report, name)).rows],
        difference_tables=difference_tables(report),
        general_tables=general_task_tables(report),
        gate_tables=gate_tables(report),
        best_table=best_table(report),
        summary_table=summary_table(report),
        cost_table=cost_table(report),
    )


def rendered(template: str, **content: Any) -> str:
    """A template of this folder with its content. Everything is escaped except the SVG of the figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup
    return environment.get_template(template).render(headings=HEADINGS, notation=NOTATION, **content)
