"""``fggm export``: an adapter in a form that needs no fggm_peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from .output import Result, require_adapter, require_free

if TYPE_CHECKING:
    from rich.console import Group

    from ..deltas.to_lora import LoraExport


def run(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an FGGM adapter.")],
    to: Annotated[Literal["lora"], typer.Option(help="The form: a LoRA adapter of PEFT.")] = "lora",
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder for the LoRA adapter.")] = None,
    max_rank: Annotated[Optional[int], typer.Option(min=1, help="Largest rank that may be written.")] = None,
    base: Annotated[
        Optional[str], typer.Option(help="Folder or Hub id of the base, for its layers (default: the one it names).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the ranks, and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> Result:
    """Export ADAPTER as a LoRA adapter that loads with PEFT alone, and in engines that only know LoRA.

    A delta of k rows or columns is a LoRA of rank k: exact. Ranks are padded with zeros to 8, 16, 32, 64, 128, 256,
    320 or 512.
    """
    require_adapter(adapter)
    if output is None and not dry_run:
        raise typer.BadParameter("say where to write, or --dry-run to see the ranks", param_hint="--output")
    from ..deltas import export_lora, lora_ranks

    if dry_run or output is None:
        found = lora_ranks(adapter, base)
        return Result({"adapter": adapter, "to": to, "output": None, **found.to_dict()}, _shown(found, None))
    require_free(output, overwrite)
    found = export_lora(adapter, output, max_rank, base)
    return Result({"adapter": adapter, "to": to, "output": str(output), **found.to_dict()}, _shown(found, output))


def _shown(found: LoraExport, output: Path | None) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if output is None else Text(f"Saved to {output}"))
    table.add_column("module", overflow="fold")
    for heading in ("required rank", "rank"):
        table.add_column(heading, justify="right")
    for name, module in found.modules.items():
        table.add_row(Text(name), str(module.required), str(module.rank))
    return Group(table, Text(str(found)))
