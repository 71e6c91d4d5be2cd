"""``fggm sequence``: trains methods on a stream of tasks and writes a report."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .options import positive
from .output import Result, require_free, table


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("stream", metavar="STREAM", help="YAML or JSON file, or a built-in stream's name.")
    parser.add_argument("--output", "-o", type=Path, required=True, help="Folder for the runs and the report.")
    parser.add_argument("--model", help="Folder or Hub id; overrides the file.")
    parser.add_argument("--data", help="Folder that the tasks' paths are relative to.")
    parser.add_argument("--seeds", type=_list, help="For example 0,1,2; overrides the file.")
    parser.add_argument("--orders", type=_list, help="For example given,reversed,random:3; overrides the file.")
    parser.add_argument("--learning-rates", type=_list, help="For example 1e-4,3e-4; overrides the file.")
    parser.add_argument("--methods", type=_list, help="Run only the methods with these labels.")
    text = "Also save a checkpoint within a task after this many steps."
    parser.add_argument("--checkpoint-steps", type=positive, help=text)
    parser.add_argument("--resume", action="store_true", help="Continue the runs in the output folder.")
    text = "Compute this many runs at the same time. They share the processor's threads and the CUDA devices."
    parser.add_argument("--processes", type=positive, default=1, help=text)


def run(args: Namespace) -> Result | None:
    """Train every method of STREAM on its tasks, one after another.

    Finished runs are saved at once in the output folder, with report.json and report.md. report.html follows at the
    end. If the command is interrupted, rerun it with --resume to continue with identical results. Further processes
    may share the work, also from other machines. Under accelerate launch, the processes compute each run together.
    """
    from ..continual.measures import MEASURES
    from ..continual.reading import read_stream
    from ..continual.report import read_results, report_of, shown, write_report
    from ..continual.run import begin_output, run_stream, runs_of
    from ..training.base_model import this_process
    from .processes import compute_together

    if args.processes > 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--processes computes several runs at once, accelerate launch each run together; use one")
    settings = read_stream(
        args.stream,
        model=args.model,
        data=args.data,
        seeds=args.seeds,
        learning_rates=args.learning_rates,
        orders=args.orders,
    )
    if args.methods is not None:
        settings = settings.with_methods(args.methods)
    output = args.output
    require_free(output, overwrite=True)  # so that the folder can be read
    if not any(output.glob("stream.json*")):  # another process may be writing it
        require_free(output, overwrite=False)
    runs, is_main = runs_of(settings), this_process().is_main_process
    try:
        if args.processes > 1:
            begin_output(settings, output, args.resume)
            args.resume = True
            compute_together(args, runs)
        for _ in run_stream(settings, output, args.resume, args.checkpoint_steps):
            if is_main:
                write_report(output, read_results([output]), page=False)
    finally:
        if is_main and (unfinished := sum(not run.is_finished(output) for run in runs)):
            text = f"{unfinished} of {len(runs)} runs are not finished; rerun with --resume to continue"
            print(text, file=sys.stderr)
    if not is_main or not any(run.is_finished(output) for run in runs):  # other processes compute them
        return None
    results = read_results([output])
    write_report(output, results)
    report = report_of(results)
    columns = ("op", "diagonal", "bwt", "general")  # the columns that fit a terminal; the report has all
    rows = [
        (entry["label"], f"{entry['learning_rate']:g}", str(entry["runs"]), *(shown(entry[name]) for name in columns))
        for entry in report["summary"]
    ]
    headings = ("method", "rate", "runs", *(MEASURES[name].heading for name in columns))
    return report, table("Mean over runs (± standard deviation)", headings, rows)


def _list(text: str) -> list[str]:
    return text.split(",")
