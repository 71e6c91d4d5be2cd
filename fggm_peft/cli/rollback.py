"""``fggm rollback``: removes a task from a ledger, and from a model into which it was merged."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import Overwrite
from .output import Result, facts_table, require_free


def run(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="Folder that fggm merge --ledger created.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    model: Annotated[Optional[str], typer.Option(help="Folder or Hub id of the merged model.")] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the model without the task.")
    ] = None,
    overwrite: Overwrite = False,
) -> Result:
    """Remove TASK from LEDGER and, with --model, from the merged model.

    The ledger's original entries are restored. The result is bit for bit the model without the task, also if other
    tasks changed the same entries.
    """
    from ..deltas.ledger import FILE, Ledger
    from ..training import BaseModel, BaseModelError
    from ..tuner.files.atomic import complete_folder

    if not (ledger / FILE).is_file():
        raise FileNotFoundError(f"no ledger in {str(ledger)!r}: it has no {FILE}")
    if (model is None) != (output is None):
        raise typer.BadParameter("--model and --output require each other", param_hint="--model")
    tasks = Ledger(ledger)
    if model is None or output is None:
        report = tasks.rollback(task, remove=False)
    else:
        require_free(output, overwrite)
        merged = BaseModel(model).load()
        report = tasks.rollback(task, merged, remove=False)
        with complete_folder(output) as folder:
            merged.save_pretrained(folder)
            with suppress(BaseModelError):  # it was merged without a tokenizer
                BaseModel(model).load_tokenizer().save_pretrained(folder)
    tasks.remove(task)  # last, when the model without the task is saved
    data = {"ledger": str(ledger), "output": output and str(output), **report.to_dict(), "remaining": tasks.tasks}
    facts = {
        "restored from": report.restored_from,
        "remaining": ", ".join(tasks.tasks) or "none",
        "saved to": output,
    }
    return Result(data, facts_table(str(report), facts))
