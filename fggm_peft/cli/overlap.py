"""``fggm overlap``: how much adapters share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .output import Result, require_adapter

PICTURES = (".svg", ".png", ".pdf")


def run(
    adapters: Annotated[list[str], typer.Argument(metavar="A B...", help="Folders or Hub ids of FGGM adapters.")],
    modules: Annotated[bool, typer.Option("--modules", help="Show every module too.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw a heat map into this file (.svg, .png or .pdf).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of the plot.")] = False,
) -> Result:
    """Compare the supports and the values of adapters of one base, pair by pair.

    The Jaccard index is of the weight entries that both may move; beside it stands what random supports of the same
    sizes would have. The cosine is of the values on the shared entries.
    """
    if len(adapters) < 2:
        raise typer.BadParameter("an overlap is of two adapters or more", param_hint="A B...")
    for adapter in adapters:
        require_adapter(adapter)
    if plot is not None and plot.suffix not in PICTURES:
        raise typer.BadParameter(f"{plot} is none of {', '.join(PICTURES)}", param_hint="--plot")
    if plot is not None and plot.exists() and not overwrite:
        raise FileExistsError(f"{plot} is there already; name another file, or pass --overwrite")
    from ..deltas import overlap

    found = overlap(*adapters)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        found.heat_map(plot)
    data = {"adapters": adapters, **found.to_dict(), "plot": None if plot is None else str(plot)}
    return Result(data, found.table(by_module=modules))
