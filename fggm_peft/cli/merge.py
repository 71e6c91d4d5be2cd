"""``fggm merge``: a base model with adapters in its weights, as a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .options import BaseOptions
from .output import Result, require_adapter, require_free

if TYPE_CHECKING:
    from rich.console import Group

    from ..tuner.merging.report import MergeReport


def run(
    base: BaseOptions,
    adapter: Annotated[
        list[str], typer.Option("--adapter", "-a", help="Folder or Hub id of an FGGM adapter; repeat it, in order.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the merged model.")],
    ledger: Annotated[
        Optional[Path],
        typer.Option(help="Also write down the adapters here, with what fggm rollback needs to take any out again."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> Result:
    """Merge adapters into MODEL and save the whole model, which loads without PEFT.

    Every changed entry is added in float32 and rounded once for each adapter. merge_report.json beside the model says,
    module by module, what became of the deltas.
    """
    for folder in adapter:
        require_adapter(folder)
    require_free(output, overwrite)
    if ledger is not None:
        require_free(ledger, overwrite=False)
    from ..deltas import Ledger, apply_deltas
    from ..deltas.apply import require_dense, save_merged

    if base.base().quantization is not None:
        raise typer.BadParameter("a merged checkpoint of it would lose part of the deltas", param_hint="--quantization")
    model = base.base().load()
    require_dense(model)
    if ledger is None:
        report = apply_deltas(model, adapter, progress=True)
    else:
        kept = Ledger(ledger)
        for name, folder in zip(_task_names(adapter), adapter, strict=True):
            kept.add(name, folder)
        report = kept.apply(model, progress=True)
    save_merged(model, output, report, _tokenizer(base))
    data = {
        "model": base.model,
        "adapters": adapter,
        "output": str(output),
        "ledger": None if ledger is None else str(ledger),
        **report.to_dict(),
    }
    return Result(data, _shown(report, data))


def _task_names(adapters: list[str]) -> list[str]:
    """The names of the folders; with a number where two have the same."""
    names: list[str] = []
    for adapter in adapters:
        short = Path(adapter).name
        names.append(short if short not in names else f"{short}-{len(names) + 1}")
    return names


def _tokenizer(base: BaseOptions) -> Any:
    """That of the base, if it has one; it is saved as it is."""
    from ..training.base_model import BaseModelError

    try:
        return base.base().load_tokenizer()
    except BaseModelError:
        return None


def _shown(report: MergeReport, data: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Saved to {data['output']}"))
    table.add_column("module", overflow="fold")
    for heading in ("norm of the delta", "survived", "outcome"):
        table.add_column(heading, justify="right")
    for module in report.modules:
        table.add_row(Text(module.name), f"{module.delta_norm:.4g}", f"{module.survived:.2%}", module.outcome)
    return Group(table, Text(str(report)))
