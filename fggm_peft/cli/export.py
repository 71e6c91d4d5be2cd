"""``fggm export``: converts an adapter to a format that other software reads."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .options import positive
from .output import Result, add_adapter, add_output, require_adapter, require_free, table


def add_options(parser: ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--to", choices=["lora"], default="lora", help="The format: a LoRA adapter of PEFT.")
    parser.add_argument("--max-rank", type=positive, help="Largest rank to write; a higher one fails.")
    parser.add_argument("--base", help="Folder or Hub id of the base (default: the one that the adapter names).")
    add_output(parser, "Folder for the LoRA adapter.")


def run(args: Namespace) -> Result:
    """Export ADAPTER as a LoRA adapter, for PEFT without fggm_peft and for engines that support only LoRA.

    The export is exact: a delta of k rows or columns is a LoRA of rank k. fggm inspect shows the ranks.
    """
    require_adapter(args.adapter)
    require_free(args.output, args.overwrite)
    from ..deltas import export_lora

    ranks = export_lora(args.adapter, args.output, args.max_rank, args.base)
    data = {"adapter": args.adapter, "to": args.to, "output": str(args.output), "rank": max(ranks.values())}
    rows = [(path, str(rank)) for path, rank in ranks.items()]
    return {**data, "ranks": ranks}, table(f"Saved to {args.output}", ("module", "rank"), rows)
