"""``fggm export``: converts an adapter to a format that other software reads."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from ..deltas.exports import EXPORTS
from .options import positive
from .output import Result, add_adapter, add_output, require_adapter, require_free, table


def add_options(parser: ArgumentParser) -> None:
    add_adapter(parser)
    text = "An adapter of PEFT (lora, supertuning, shira), or dense changes by the names of the base's weights."
    parser.add_argument("--to", choices=list(EXPORTS), default="lora", help=text)
    text = "Largest rank of the server that will load the LoRA; the command warns if a module exceeds it."
    parser.add_argument("--max-rank", type=positive, help=text)
    text = "Give all modules of the LoRA the same rank, as llama.cpp requires."
    parser.add_argument("--equal-ranks", action="store_true", help=text)
    parser.add_argument("--base", help="Folder or Hub id of the base (default: the one that the adapter names).")
    add_output(parser, "Folder for the exported adapter.")


def run(args: Namespace) -> Result:
    """Export ADAPTER, exactly, for software that does not know fggm_peft.

    lora: PEFT, and engines that support only LoRA. A delta of k rows or columns is a LoRA of rank k; fggm inspect shows
    the ranks. supertuning, shira: PEFT, also for single elements. task-vector: dense tensors, for arithmetic on models.
    """
    require_adapter(args.adapter)
    options = {"max_rank": args.max_rank, "equal_ranks": args.equal_ranks}
    options = {name: value for name, value in options.items() if value}
    if options and args.to != "lora":
        args.error(f"--{next(iter(options)).replace('_', '-')}: only a LoRA has ranks")
    require_free(args.output, args.overwrite)
    export, unit = EXPORTS[args.to]
    sizes = export(args.adapter, args.output, base=args.base, **options)
    data = {"adapter": args.adapter, "to": args.to, "output": str(args.output), "largest": max(sizes.values())}
    rows = [(path, f"{size:,}") for path, size in sizes.items()]
    return {**data, "modules": sizes}, table(f"Saved to {args.output}", ("module", unit), rows)
