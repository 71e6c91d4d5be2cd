"""``fggm sequence``: methods learn a stream of tasks, and a report says what was learned, forgotten and spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .command import Result

if TYPE_CHECKING:
    from rich.table import Table


def run(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="YAML or JSON file, or the name of a ready stream.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and the report.")],
    model: Annotated[Optional[str], typer.Option(help="Folder or Hub id; goes before the file's.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Folder that the tasks' paths start from.")] = None,
    seeds: Annotated[Optional[str], typer.Option(help="Such as 0,1,2; goes before the file's.")] = None,
    orders: Annotated[Optional[str], typer.Option(help="Such as given,reversed,random:3.")] = None,
    checkpoint_steps: Annotated[
        Optional[int], typer.Option(min=1, help="Also save within a task, every so many steps.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in the output folder.")] = False,
) -> Result:
    """Run the stream of tasks in STREAM with each of its methods.

    Every finished run is in the output folder at once, and in report.json and report.md. Stop it at any moment; the
    same command with --resume goes on, to the same results.
    """
    from ..continual.report import report_of, write_report
    from ..continual.run import run_stream, runs_of
    from ..continual.stream import read_stream

    given: dict[str, Any] = {"model": model, "data": data}
    given["seeds"] = None if seeds is None else _numbers(seeds)
    given["orders"] = None if orders is None else orders.split(",")
    found = read_stream(stream, **given)
    results: list[dict[str, Any]] = []
    try:
        for result in run_stream(found, output, resume, checkpoint_steps):
            results.append(result)
            write_report(output, results)
    except KeyboardInterrupt:
        typer.echo(
            f"stopped after {len(results)} of {len(runs_of(found))} runs; go on with the same command and --resume",
            err=True,
        )
        raise typer.Exit(130) from None
    report = report_of(results)
    return Result(report, _table(report))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2", param_hint="--seeds") from None


def _table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    from ..continual.report import COLUMNS, shown

    table = Table(title="Mean over runs (± standard deviation)")
    for heading in ("method", "learning rate", "runs", *COLUMNS):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for entry in report["summary"]:
        cells = [shown(entry[name]) for name in COLUMNS.values()]
        table.add_row(entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"]), *cells)
    return table
