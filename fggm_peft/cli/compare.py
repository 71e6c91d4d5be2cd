"""``fggm compare``: the runs of several folders side by side, and what differs, pair by pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .command import Result

if TYPE_CHECKING:
    from rich.console import Group

PAGES = (".html", ".htm")


def run(
    runs: Annotated[
        list[str], typer.Argument(metavar="A B...", help="Output folders of fggm sequence, or their report.json.")
    ],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="An .html file, or a folder for compare.html and .json.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there under this name.")] = False,
) -> Result:
    """Compare the runs in A with those in B, and in any others.

    Runs of the same method, learning rate, seed and order are paired; where A and B have no method in common, each
    method's best learning rate is. What differs in model, data and training is said.
    """
    from ..continual.report.comparison import compare, read_source

    files = _free_files(output, overwrite)
    comparison = compare([read_source(path) for path in runs])
    if files:
        from ..continual.report.page import comparison_page
        from ..tuner.files.atomic import write_whole

        page, data = files
        write_whole(page, comparison_page(comparison))
        if data is not None:
            write_whole(data, json.dumps(comparison, indent=1, allow_nan=False))
    return Result(comparison, _shown(comparison))


def _free_files(output: Path | None, overwrite: bool) -> tuple[Path, Path | None] | None:
    """The page, and the JSON if the output is a folder."""
    from ..continual.report import require_report_packages

    if output is None:
        return None
    require_report_packages()
    is_page = output.suffix in PAGES
    files = (output, None) if is_page else (output / "compare.html", output / "compare.json")
    for file in files:
        if file is not None and file.exists() and not overwrite:
            raise FileExistsError(f"{file} is there already; name another output, or pass --overwrite")
    if not is_page and output.exists() and not output.is_dir():
        raise NotADirectoryError(f"the output {output} is neither a folder nor an .html file")
    return files


def _shown(comparison: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..continual.report.comparison import comparison_tables

    parts: list[Any] = [Text(warning, style="yellow") for warning in comparison["warnings"]]
    for found in comparison_tables(comparison):
        # Text, not str: a label is not markup
        table = Table(title=Text(found.title))
        for number, heading in enumerate(found.headings):
            table.add_column(heading, justify="left" if number < found.names else "right")
        for row in found.rows:
            table.add_row(*map(Text, row))
        parts += [table, Text(found.note)]
    return Group(*parts)
