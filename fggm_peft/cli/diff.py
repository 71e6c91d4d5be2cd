"""``fggm diff``: computes the sparse delta between a base model and a fine-tuned model."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .generated import read_value
from .options import Output, Overwrite
from .output import ADAPTER_FILE, Result, facts_table, file_size, require_free


def run(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder or Hub id of the base model.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder or Hub id of the fine-tuned model.")],
    output: Output,
    granularity: Annotated[
        Optional[str], typer.Option(help="row, column or element, or JSON (default: the smallest in bytes).")
    ] = None,
    overwrite: Overwrite = False,
) -> Result:
    """Save the difference between TUNED and BASE as an adapter. Merged into BASE, it gives TUNED bit for bit.

    The command reads safetensors files, one tensor at a time. It stores changed norms as whole tensors.
    """
    require_free(output, overwrite)
    from ..core.granularity import Granularity
    from ..deltas import diff

    delta = diff(base, tuned, read_value(granularity, Optional[Granularity], "granularity"), progress=True)
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
    facts = {
        "granularity": data["granularity"],
        "modules": f"{data['modules']:,}",
        "whole tensors": f"{data['whole_tensors']:,}",
        "values": f"{delta.parameters:,}",
        "density": f"{delta.density:.2%}",
        "inexact entries": f"{data['inexact_entries']:,}",
        "adapter file": file_size(output / ADAPTER_FILE),
    }
    return Result(data, facts_table(f"Saved to {output}", facts))
