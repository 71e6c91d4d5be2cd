"""``report.html``: one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import tables
from .contents import HEADINGS, INTERVALS
from .drawing import legend_of, pictures_of
from .markdown import NOTATION, TITLE


def page_of(report: Mapping[str, Any]) -> str:
    """The page of a report. Everything is escaped except the SVG of the figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template("report.html").render(
        title=TITLE,
        report=report,
        headings=HEADINGS,
        notation=NOTATION,
        intervals=INTERVALS,
        legend=legend_of(report),
        pictures=pictures_of(report),
        tables=tables,
    )
