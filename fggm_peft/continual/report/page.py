"""``report.html``: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .contents import INTERVALS
from .markdown import NOTATION
from .pictures import Pictures
from .tables import (
    HEADINGS,
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
    pictures = Pictures(report)
    return rendered(
        "report.html",
        title="What was learned, and what it cost",
        report=report,
        intervals=INTERVALS,
        legends=[pictures.swatches() for _ in range(2)],  # drawn for each place: no two elements may share an id
        fronts=list(pictures.fronts()),
        front_tables=[table for name in report["pareto"] if (table := pareto_table(report, name)).rows],
        differences=list(pictures.differences()),
        difference_tables=difference_tables(report),
        matrices=list(pictures.score_matrices()),
        curves=list(pictures.curves()),
        general=list(pictures.general_curve()),
        general_tables=general_task_tables(report),
        overlaps=list(pictures.overlaps()),
        gate_tables=gate_tables(report),
        costs=list(pictures.costs()),
        best_table=best_table(report),
        summary_table=summary_table(report),
        cost_table=cost_table(report),
    )


def rendered(template: str, **content: Any) -> str:
    """A template of this folder with its content. Everything is escaped but the SVG that ``plotting`` drew."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = Markup
    return environment.get_template(template).render(headings=HEADINGS, notation=NOTATION, **content)
