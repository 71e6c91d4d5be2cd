"""``fggm rollback``: removes a task from a ledger, and from a model into which it was merged."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .output import Result, add_output, facts_table, require_free, save_model


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("ledger", metavar="LEDGER", type=Path, help="Folder that fggm merge --ledger created.")
    parser.add_argument("task", metavar="TASK", help="Name of the task.")
    parser.add_argument("--model", help="Folder or Hub id of the merged model.")
    add_output(parser, "Folder for the model without the task.", required=False)


def run(args: Namespace) -> Result:
    """Remove TASK from LEDGER and, with --model, from the merged model.

    The ledger's original entries are restored. The result is bit for bit the model without the task, also if other
    tasks changed the same entries.
    """
    from ..deltas.ledger import FILE, Ledger
    from ..training.base_model import BaseModel
    from ..tuner.files.atomic import complete_folder, require_writable

    if not (args.ledger / FILE).is_file():
        raise FileNotFoundError(f"no ledger in {str(args.ledger)!r}: it has no {FILE}")
    if (args.model is None) != (args.output is None):
        args.error("--model and --output require each other")
    require_writable(args.ledger)
    ledger = Ledger(args.ledger)
    if args.model is None:
        ledger.remove(args.task)
    else:
        require_free(args.output, args.overwrite)
        base = BaseModel(args.model)
        merged = base.load()
        ledger.rollback(args.task, merged, remove=False)
        with complete_folder(args.output) as folder:
            save_model(base, merged, folder)
        ledger.remove(args.task)  # last, when the model without the task is saved
    output = None if args.output is None else str(args.output)
    data = {"ledger": str(args.ledger), "task": args.task, "output": output, "remaining": ledger.tasks}
    return data, facts_table(f"Removed {args.task}", data)
