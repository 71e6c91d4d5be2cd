"""Writes a report's files, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...tuner.files.atomic import write_whole
from .contents import report_of

PACKAGES = ("jinja2", "matplotlib", "scipy")


def require_report_packages() -> None:
    """Raise ``ImportError`` unless everything is there that a report needs; for before a run, not after it."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ImportError(f"a report needs {' and '.join(missing)}: pip install 'fggm-peft[continual]'")


def write_report(folder: Path, results: Sequence[dict[str, Any]], page: bool = True) -> None:
    """``report.json``, ``report.md`` and ``report.html`` in ``folder``; the same results give the same bytes.

    Args:
        results: of ``run_stream``, of a comparison that is finished or not.
        page: write ``report.html`` too. It takes some seconds, the other two do not.
    """
    from .markdown import markdown_of

    report = report_of(results)
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False))
    write_whole(folder / "report.md", markdown_of(report))
    if page:
        from .page import page_of

        write_whole(folder / "report.html", page_of(report))
