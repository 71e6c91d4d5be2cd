"""``fggm sequence``: trains methods on a stream of tasks and writes a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .output import Result, table


def run(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="YAML or JSON file, or a built-in stream's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and the report.")],
    model: Annotated[Optional[str], typer.Option(help="Folder or Hub id; overrides the file.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Folder that the tasks' paths are relative to.")] = None,
    seeds: Annotated[Optional[str], typer.Option(help="For example 0,1,2; overrides the file.")] = None,
    orders: Annotated[Optional[str], typer.Option(help="For example given,reversed,random:3.")] = None,
    learning_rates: Annotated[Optional[str], typer.Option(help="For example 1e-4,3e-4; overrides the file.")] = None,
    methods: Annotated[Optional[str], typer.Option(help="Run only the methods with these labels.")] = None,
    checkpoint_steps: Annotated[
        Optional[int], typer.Option(min=1, help="Also save a checkpoint within a task after this many steps.")
    ] = None,
    gate: Annotated[
        Optional[list[str]],
        typer.Option(metavar="TASK=SHARE", help="Share of an earlier task's score to retain, e.g. intent=0.9."),
    ] = None,
    gate_action: Annotated[str, typer.Option(help="If it is not retained: stop or rollback.")] = "stop",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the runs in the output folder.")] = False,
) -> Result:
    """Train every method of STREAM on its tasks, one after another.

    Finished runs are saved at once in the output folder, with report.json and report.md. report.html follows at the
    end. If the command is interrupted, rerun it with --resume to continue with identical results. Several processes
    may share the work.
    """
    from ..continual.gate import read_gate
    from ..continual.reading import read_stream
    from ..continual.report import HEADINGS, report_of, shown, write_report
    from ..continual.run import all_results, finished_runs, run_stream, runs_of

    settings = read_stream(
        stream,
        model=model,
        data=data,
        seeds=_numbers(seeds, int, "--seeds"),
        learning_rates=_numbers(learning_rates, float, "--learning-rates"),
        orders=None if orders is None else orders.split(","),
        gate=read_gate(gate, gate_action) if gate else None,
    )
    if methods is not None:
        settings = settings.with_methods(methods.split(","))
    total = len(runs_of(settings))
    try:
        for _ in run_stream(settings, output, resume, checkpoint_steps):
            write_report(output, all_results(settings, output), page=False)
    except KeyboardInterrupt:
        if results := all_results(settings, output):
            write_report(output, results)
        done = len(finished_runs(settings, output))
        typer.echo(f"stopped after {done} of {total} runs; rerun with --resume to continue", err=True)
        raise typer.Exit(130) from None
    unfinished = total - len(finished_runs(settings, output))
    if unfinished:
        typer.echo(f"another process is still computing {unfinished} of {total} runs", err=True)
    results = all_results(settings, output)
    write_report(output, results)
    report = report_of(results)
    columns = ("op", "diagonal", "bwt", "general")  # the columns that fit a terminal; the report has all
    rows = [
        (entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"]), *(shown(entry[name]) for name in columns))
        for entry in report["summary"]
    ]
    headings = ("method", "rate", "runs", *(HEADINGS[name] for name in columns))
    return Result(report, table("Mean over runs (± standard deviation)", headings, rows))


def _numbers(text: str | None, kind: Callable[[str], Any], option: str) -> list[Any] | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2", param_hint=option) from None
