"""``fggm diff``: computes the sparse delta between a base model and a fine-tuned model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Optional

from ..core.granularity import UnitKind
from .options import read_value
from .output import ADAPTER_FILE, Result, add_output, facts_table, require_free


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="Folder or Hub id of the base model.")
    parser.add_argument("tuned", metavar="TUNED", help="Folder or Hub id of the fine-tuned model.")
    text = "row, column or element, or JSON (default: the smallest in bytes)."
    parser.add_argument("--granularity", type=partial(read_value, Optional[UnitKind]), help=text)
    add_output(parser)


def run(args: Namespace) -> Result:
    """Save the difference between TUNED and BASE as an adapter. Merged into BASE, it gives TUNED bit for bit.

    The command reads safetensors files, one tensor at a time. It stores changed norms as whole tensors.
    """
    require_free(args.output, args.overwrite)
    from ..deltas import diff

    delta = diff(args.base, args.tuned, args.granularity)
    delta.save(args.output)
    assert delta.config.selection is not None
    data = {
        "base": args.base,
        "tuned": args.tuned,
        "output": str(args.output),
        "granularity": str(delta.config.granularity),
        "modules": len(delta.modules),
        "whole_tensors": len(delta.others),
        "parameters": delta.parameters,
        "density": delta.density,
        **{name: delta.config.selection[name] for name in ("inexact_entries", "config_differences")},
        "bytes": (args.output / ADAPTER_FILE).stat().st_size,
    }
    return data, facts_table(f"Saved to {args.output}", data)
