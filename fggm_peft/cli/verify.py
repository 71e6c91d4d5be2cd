"""``fggm verify``: is an adapter's file whole and legal, and is this its base?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .output import Result, require_adapter

if TYPE_CHECKING:
    from rich.table import Table

    from ..deltas import Verification


def run(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an adapter.")],
    base: Annotated[
        Optional[str], typer.Option("--base", "-b", help="Folder or Hub id of the model that it should fit.")
    ] = None,
) -> Result:
    """Check every tensor of ADAPTER, without loading it into a model.

    With --base, the model is loaded and it is checked that the adapter was made on it. What is wrong is an error that
    names the file and the tensor.
    """
    require_adapter(adapter)

    from ..deltas import verify

    found = verify(adapter, base)
    return Result(found.to_dict(), _table(found))


def _table(found: Verification) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(title=f"{found.adapter} is sound", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "base": found.base_model or "",
        "base checked": found.base,
        "format": str(found.format),
        "support": f"{found.granularity}s by {found.criterion}, {found.density:.2%} of {found.modules} modules",
        "values": f"{found.parameters:,} in {', '.join(found.dtypes)}" + (", all zero" if found.is_zero else ""),
        "file": f"{decimal(found.bytes)}, {found.bytes / max(1, found.bound_bytes):.3f} x the entropy bound",
        "other tensors": ", ".join(found.other_keys),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(found.made_with.items())),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table
