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
    gate: Annotated[
        Optional[list[str]],
        typer.Option(metavar="TASK=SHARE", help="How much of an earlier task's score has to stay, such as intent=0.9."),
    ] = None,
    gate_action: Annotated[str, typer.Option(help="Where it does not: stop, rollback or shrink the density.")] = "stop",
    method_comparison: Annotated[
        Optional[Path],
        typer.Option(help="Also write results in the layout of PEFT's method comparison, to this folder."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what there is to do and about how long it takes.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the runs in the output folder, also beside another process.")
    ] = False,
) -> Result:
    """Run the stream of tasks in STREAM with each of its methods.

    Every finished run is in the output folder at once, and in report.json and report.md. Stop it at any moment; the
    same command with --resume goes on, to the same results.
    """
    from ..continual.gate import read_gate
    from ..continual.method_comparison import write_method_comparison
    from ..continual.plan import plan_of
    from ..continual.report import report_of, write_report
    from ..continual.run import finished_runs, run_stream, runs_of
    from ..continual.stream import read_stream

    given: dict[str, Any] = {"model": model, "data": data}
    given["seeds"] = None if seeds is None else _numbers(seeds)
    given["orders"] = None if orders is None else orders.split(",")
    given["gate"] = read_gate(gate, gate_action) if gate else None
    found = read_stream(stream, **given)
    total = len(runs_of(found))
    planned = plan_of(found, output)
    if plan:
        return Result(planned.to_dict(), str(planned))
    typer.echo(str(planned), err=True)
    try:
        for _ in run_stream(found, output, resume, checkpoint_steps):
            write_report(output, finished_runs(found, output), page=False)
    except KeyboardInterrupt:
        done = finished_runs(found, output)
        if done:
            write_report(output, done)
        typer.echo(f"stopped after {len(done)} of {total} runs; go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    results = finished_runs(found, output)
    if len(results) < total:
        typer.echo(f"{total - len(results)} of {total} runs are still being computed by another process", err=True)
    write_report(output, results)
    report = report_of(results)
    if method_comparison is not None:
        write_method_comparison(report, found, method_comparison)
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
