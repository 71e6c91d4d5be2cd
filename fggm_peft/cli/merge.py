"""``fggm merge``: merges adapters into a base model and saves an ordinary checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .options import add_base, base_model
from .output import Result, add_output, require_adapter, require_free, save_model, table


def add_options(parser: ArgumentParser) -> None:
    add_base(parser)
    text = "Folder or Hub id of an FGGM adapter. Repeat it, in order."
    parser.add_argument("--adapter", "-a", action="append", required=True, help=text)
    text = "Folder that records the adapters, so that fggm rollback can remove them."
    parser.add_argument("--ledger", type=Path, help=text)
    add_output(parser)


def run(args: Namespace) -> Result:
    """Merge adapters into MODEL and save the whole model, which loads without PEFT.

    Each delta is added in float32, and the sum is rounded once for each adapter. merge_report.json in the output shows
    for each module how much of its delta survived the rounding.
    """
    for adapter in args.adapter:
        require_adapter(adapter)
    require_free(args.output, args.overwrite)
    if args.ledger is not None:
        require_free(args.ledger, overwrite=False, remedy="")
    from rich.console import Group
    from rich.text import Text

    from ..deltas import Ledger, apply_deltas
    from ..tuner.files.atomic import complete_folder, write_json

    base = base_model(args)
    if base.quantization is not None:
        args.error("--quantization: a quantized checkpoint would lose part of the deltas")
    model: Any = base.load()
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the base is quantized, and a merged checkpoint of it would lose part of the deltas. Load the base "
            "unquantized, or use merge_and_unload() with quantized_merge='requantize'"
        )
    with complete_folder(args.output) as folder, ExitStack() as stack:
        if args.ledger is None:
            report = apply_deltas(model, args.adapter)
        else:
            ledger = Ledger(stack.enter_context(complete_folder(args.ledger)))
            for name, adapter in zip(_task_names(args.adapter), args.adapter, strict=True):
                ledger.add(name, adapter)
            report = ledger.apply(model)
        save_model(base, model, folder)
        write_json(folder / "merge_report.json", report.to_dict())
    data = {"model": args.model, "adapters": args.adapter, "output": str(args.output)}
    headings = ("module", "norm of the delta", "survived", "outcome")
    rows = [(m.name, f"{m.delta_norm:.4g}", f"{m.survived:.2%}", m.outcome) for m in report.modules]
    note = Text(f"{report.survived:.2%} of the deltas is in the weights.")
    shown = Group(table(f"Saved to {args.output}", headings, rows), note)
    return {**data, "ledger": args.ledger and str(args.ledger), **report.to_dict()}, shown


def _task_names(adapters: list[str]) -> list[str]:
    """The names of the folders, with a number if two are equal."""
    names: list[str] = []
    for adapter in adapters:
        name = Path(adapter).name
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names
