"""``fggm diff``: the sparse delta between a base model and a fine-tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .output import ADAPTER_FILE, Result, require_free

if TYPE_CHECKING:
    from rich.table import Table


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the base model.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder or Hub id of the model made of it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.")],
    granularity: Annotated[
        Optional[str], typer.Option(help="row, column or element (default: what takes the fewest bytes).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")] = False,
) -> Result:
    """Write what TUNED has changed in BASE as an adapter: merged into BASE it gives TUNED bit for bit.

    Both are read from safetensors files, one tensor at a time. Norms that have changed go along whole.
    """
    require_free(output, overwrite)
    from ..deltas import diff

    delta = diff(base, tuned, granularity, progress=True)
    delta.save(output)
    assert delta.config.selection is not None
    data = {
        "base": base,
        "tuned": tuned,
        "output": str(output),
        "granularity": str(delta.config.granularity),
        "modules": len(delta.modules),
        "whole_tensors": len(delta.others),
        "parameters": delta.parameters,
        "density": delta.density,
        "inexact_entries": delta.config.selection["inexact_entries"],
        "bytes": (output / ADAPTER_FILE).stat().st_size,
    }
    return Result(data, _table(data))


def _table(data: dict[str, Any]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"Saved to {data['output']}"), show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    lines = {
        "granularity": data["granularity"],
        "modules": f"{data['modules']:,}",
        "whole tensors": f"{data['whole_tensors']:,}",
        "values": f"{data['parameters']:,}",
        "density": f"{data['density']:.2%}",
        "entries that are not exact": f"{data['inexact_entries']:,}",
        "adapter file": decimal(data["bytes"]),
    }
    for name, text in lines.items():
        table.add_row(name, Text(text))
    return table
