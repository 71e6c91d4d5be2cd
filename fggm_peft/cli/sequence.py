"""``fggm sequence``: methods learn a stream of tasks, and a report says what was learned, forgotten and spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer

from .output import Result

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


def run(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="YAML or JSON file, or the name of a ready stream.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and the report.")],
    model: Annotated[Optional[str], typer.Option(help="Folder or Hub id; goes before the file's.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Folder that the tasks' paths start from.")] = None,
    seeds: Annotated[Optional[str], typer.Option(help="Such as 0,1,2; goes before the file's.")] = None,
    orders: Annotated[Optional[str], typer.Option(help="Such as given,reversed,random:3.")] = None,
    learning_rates: Annotated[Optional[str], typer.Option(help="Such as 1e-4,3e-4; goes before the file's.")] = None,
    methods: Annotated[Optional[str], typer.Option(help="Labels of the file's methods: only these.")] = None,
    checkpoint_steps: Annotated[
        Optional[int], typer.Option(min=1, help="Also save within a task, every so many steps.")
    ] = None,
    gate: Annotated[
        Optional[list[str]],
        typer.Option(metavar="TASK=SHARE", help="How much of an earlier task's score has to stay, such as intent=0.9."),
    ] = None,
    gate_action: Annotated[str, typer.Option(help="If it does not: stop the run, or rollback the task.")] = "stop",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the runs in the output folder, also beside another process.")
    ] = False,
) -> Result:
    """Run the stream of tasks in STREAM with each of its methods.

    Every finished run is in the output folder at once, and in report.json and report.md; report.html is written at
    the end, of all runs that are in the folder. Stop it at any moment; the same command with --resume goes on, to the
    same results, also in several processes at a time.
    """
    from ..continual.gate import read_gate
    from ..continual.reading import read_stream
    from ..continual.report import report_of, write_report
    from ..continual.run import all_results, finished_runs, run_stream, runs_of

    given: dict[str, Any] = {"model": model, "data": data}
    given["seeds"] = None if seeds is None else _numbers(seeds, int, "--seeds")
    given["learning_rates"] = None if learning_rates is None else _numbers(learning_rates, float, "--learning-rates")
    given["orders"] = None if orders is None else orders.split(",")
    given["gate"] = read_gate(gate, gate_action) if gate else None
    found = read_stream(stream, **given)
    if methods is not None:
        found = found.with_methods(methods.split(","))
    total = len(runs_of(found))
    try:
        for _ in run_stream(found, output, resume, checkpoint_steps):
            write_report(output, all_results(found, output), page=False)
    except KeyboardInterrupt:
        if results := all_results(found, output):
            write_report(output, results)
        done = len(finished_runs(found, output))
        typer.echo(f"stopped after {done} of {total} runs; go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    finished, results = finished_runs(found, output), all_results(found, output)
    if len(finished) < total:
        typer.echo(f"{total - len(finished)} of {total} runs are still being computed by another process", err=True)
    write_report(output, results)
    report = report_of(results)
    return Result(report, _table(report))


def _numbers(text: str, kind: Callable[[str], T], option: str) -> list[T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2", param_hint=option) from None


def _table(report: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from ..continual.report import HEADINGS, shown

    # what fits a terminal; the report has the others
    names = ("op", "diagonal", "bwt", "general")
    table = Table(title="Mean over runs (± standard deviation)")
    for heading in ("method", "rate", "runs", *(HEADINGS[name] for name in names)):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for entry in report["summary"]:
        cells = [shown(entry[name]) for name in names]
        table.add_row(Text(entry["label"]), f"{entry['learning_rate']:g}", str(entry["runs"]), *cells)
    return table
