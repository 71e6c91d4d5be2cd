"""``fggm export``: converts an adapter to a format that other software reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from .options import Adapter, Overwrite
from .output import Result, require_adapter, require_free, table


def run(
    adapter: Adapter,
    to: Annotated[Literal["lora"], typer.Option(help="The format: a LoRA adapter of PEFT.")] = "lora",
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the LoRA adapter. Required without --dry-run.")
    ] = None,
    max_rank: Annotated[Optional[int], typer.Option(min=1, help="Largest rank to write; a higher one fails.")] = None,
    base: Annotated[
        Optional[str], typer.Option(help="Folder or Hub id of the base (default: the one that the adapter names).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the ranks and write nothing.")] = False,
    overwrite: Overwrite = False,
) -> Result:
    """Export ADAPTER as a LoRA adapter, for PEFT without fggm_peft and for engines that support only LoRA.

    The export is exact: a delta of k rows or columns is a LoRA of rank k. Ranks are padded with zeros to 8, 16, 32, 64,
    128, 256, 320 or 512.
    """
    require_adapter(adapter)
    if output is None and not dry_run:
        raise typer.BadParameter("name a folder, or pass --dry-run to see the ranks", param_hint="--output")
    from rich.console import Group
    from rich.text import Text

    from ..deltas import export_lora, lora_ranks

    if dry_run or output is None:
        output, export = None, lora_ranks(adapter, base)
    else:
        require_free(output, overwrite)
        export = export_lora(adapter, output, max_rank, base)
    data = {"adapter": adapter, "to": to, "output": None if output is None else str(output), **export.to_dict()}
    rows = [(name, str(module.required), str(module.rank)) for name, module in export.modules.items()]
    ranks = table("" if output is None else f"Saved to {output}", ("module", "required rank", "rank"), rows)
    return Result(data, Group(ranks, Text(str(export))))
