"""``fggm overlap``: compares the supports and values of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .output import Result, require_adapter

PLOT_TYPES = (".svg", ".png", ".pdf")


def run(
    adapters: Annotated[list[str], typer.Argument(metavar="A B...", help="Folders or Hub ids of FGGM adapters.")],
    modules: Annotated[bool, typer.Option("--modules", help="Also show every module.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw a heat map into this file (.svg, .png or .pdf).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plot's file.")] = False,
) -> Result:
    """Compare the supports and values of several adapters of one base, pair by pair.

    The Jaccard index counts the weight entries that both adapters may change. The expected index of random supports of
    the same sizes is shown beside it. The cosine compares the values on the shared entries.
    """
    if len(adapters) < 2:
        raise typer.BadParameter("name at least two adapters", param_hint="A B...")
    for adapter in adapters:
        require_adapter(adapter)
    if plot is not None and plot.suffix not in PLOT_TYPES:
        raise typer.BadParameter(f"{plot} must end in {', '.join(PLOT_TYPES)}", param_hint="--plot")
    if plot is not None and plot.exists() and not overwrite:
        raise FileExistsError(f"{plot} already exists; name another file, or pass --overwrite")
    from ..deltas import overlap

    result = overlap(*adapters)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        result.heat_map(plot)
    data = {"adapters": adapters, **result.to_dict(), "plot": None if plot is None else str(plot)}
    return Result(data, result.table(by_module=modules))
