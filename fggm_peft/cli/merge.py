"""``fggm merge``: merges adapters into a base model and saves an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .options import BaseOptions, Output, Overwrite
from .output import Result, require_adapter, require_free, table


def run(
    base: BaseOptions,
    adapter: Annotated[
        list[str], typer.Option("--adapter", "-a", help="Folder or Hub id of an FGGM adapter. Repeat it, in order.")
    ],
    output: Output,
    ledger: Annotated[
        Optional[Path], typer.Option(help="Folder that records the adapters, so that fggm rollback can remove them.")
    ] = None,
    overwrite: Overwrite = False,
) -> Result:
    """Merge adapters into MODEL and save the whole model, which loads without PEFT.

    Each delta is added in float32, and the sum is rounded once for each adapter. merge_report.json in the output shows
    for each module how much of its delta survived the rounding.
    """
    for folder in adapter:
        require_adapter(folder)
    require_free(output, overwrite)
    if ledger is not None:
        require_free(ledger, overwrite=False)
    from rich.console import Group
    from rich.text import Text

    from ..deltas import Ledger, export_merged
    from ..training import BaseModelError

    source = base.base()
    if source.quantization is not None:
        raise typer.BadParameter("a quantized checkpoint would lose part of the deltas", param_hint="--quantization")
    model = source.load()
    if getattr(model, "is_quantized", False):  # before the ledger is written
        raise ValueError(f"{base.model} is quantized, and a merged checkpoint of it would lose part of the deltas")
    tasks = None if ledger is None else Ledger(ledger)
    if tasks is not None:
        for name, folder in zip(_task_names(adapter), adapter, strict=True):
            tasks.add(name, folder)
    try:
        tokenizer = source.load_tokenizer()
    except BaseModelError:  # the base has none
        tokenizer = None
    report = export_merged(model, tasks or adapter, output, tokenizer, progress=True)
    data = {"model": base.model, "adapters": adapter, "output": str(output), "ledger": ledger and str(ledger)}
    headings = ("module", "norm of the delta", "survived", "outcome")
    rows = [(m.name, f"{m.delta_norm:.4g}", f"{m.survived:.2%}", m.outcome) for m in report.modules]
    shown = Group(table(f"Saved to {output}", headings, rows), Text(str(report)))
    return Result({**data, **report.to_dict()}, shown)


def _task_names(adapters: list[str]) -> list[str]:
    """The names of the folders, with a number if two are equal."""
    names: list[str] = []
    for adapter in adapters:
        name = Path(adapter).name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names
