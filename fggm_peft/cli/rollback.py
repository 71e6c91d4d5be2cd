"""``fggm rollback``: takes a task out of a ledger, and out of a model that it was merged into."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .output import Result, require_free

if TYPE_CHECKING:
    from rich.table import Table

    from ..deltas.ledger import RollbackReport


def run(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="Folder that fggm merge --ledger has made.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task.")],
    model: Annotated[Optional[str], typer.Option(help="Folder or Hub id of the merged model.")] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the model without the task.")
    ] = None,
    base: Annotated[
        Optional[str], typer.Option(help="Folder or Hub id of the base, if the ledger has kept no originals.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> Result:
    """Take TASK out of LEDGER and, with --model, out of the merged model.

    With the originals that the ledger has kept, or with --base, the result is bit for bit the model without the task,
    whatever the other tasks have changed. Otherwise the delta is subtracted, which leaves rounding.
    """
    from ..deltas.ledger import FILE, Ledger

    if not (ledger / FILE).is_file():
        raise FileNotFoundError(f"no ledger in {str(ledger)!r}: it has no {FILE}")
    if (model is None) != (output is None):
        raise typer.BadParameter("--model and --output go together", param_hint="--model")
    kept = Ledger(ledger)
    if model is None or output is None:
        report = kept.take_out(task)
    else:
        require_free(output, overwrite)
        report = _taken_out(kept, task, model, output, base)
    kept.remove(task)  # last: the model without the task is on the disk by now
    data = {
        "ledger": str(ledger),
        "output": None if output is None else str(output),
        **report.to_dict(),
        "remaining": kept.tasks,
    }
    return Result(data, _table(report, data))


def _taken_out(kept: Any, task: str, model: str, output: Path, base: str | None) -> RollbackReport:
    from ..training.base_model import BaseModel, BaseModelError
    from ..tuner.files.atomic import complete_folder

    source = BaseModel(name=model)
    merged = source.load()
    report = kept.take_out(task, merged, base=base)
    with complete_folder(output) as folder:
        merged.save_pretrained(folder)
        with suppress(BaseModelError):  # it was merged without a tokenizer
            source.load_tokenizer().save_pretrained(folder)
    return report


def _table(report: RollbackReport, data: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(report)), show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    table.add_row("restored from", report.restored_from)
    table.add_row("exact, bit for bit", "yes" if report.is_exact else "no")
    for name, count in report.overlaps.items():
        table.add_row(Text(f"entries shared with {name}"), f"{count:,}")
    table.add_row("remaining", Text(", ".join(data["remaining"]) or "none"))
    if data["output"] is not None:
        table.add_row("saved to", Text(data["output"]))
    return table
