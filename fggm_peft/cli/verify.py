"""``fggm verify``: checks an adapter's file, and whether it fits a base model."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .options import Adapter
from .output import Result, facts_table, require_adapter


def run(
    adapter: Adapter,
    base: Annotated[
        Optional[str], typer.Option("--base", "-b", help="Folder or Hub id of the base that the adapter should fit.")
    ] = None,
) -> Result:
    """Check every tensor of ADAPTER, without loading it into a model.

    With --base, the command loads the base and checks that the adapter was made on it. An error names the file and the
    tensor.
    """
    require_adapter(adapter)
    from rich.filesize import decimal

    from ..deltas import verify

    result = verify(adapter, base)
    facts = {
        "base": result.base_model,
        "base checked": result.base,
        "format": result.format,
        "support": f"{result.density:.2%} of {result.modules} modules, {result.granularity} by {result.criterion}",
        "values": f"{result.parameters:,} in {', '.join(result.dtypes)}" + (", all zero" if result.is_zero else ""),
        "file": f"{decimal(result.bytes)}, {result.bytes / max(1, result.bound_bytes):.3f} x the entropy bound",
        "other tensors": ", ".join(result.other_keys),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(result.made_with.items())),
    }
    return Result(result.to_dict(), facts_table(f"{result.adapter} is valid", facts))
