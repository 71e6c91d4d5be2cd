"""``fggm reference``: reads what a model should retain, and saves it for harm decay."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .options import add_base, add_batch_size, base_model, positive
from .output import Result, add_output, require_free


def add_options(parser: ArgumentParser) -> None:
    add_base(parser)
    text = "File of text to retain (.txt); empty lines separate paragraphs. May be repeated."
    parser.add_argument("--text", type=Path, action="append", required=True, help=text)
    text = "Number of paragraphs of each file (default: %(default)s)."
    parser.add_argument("--num-samples", type=positive, default=64, help=text)
    text = "Rank of the statistics (default: %(default)s)."
    parser.add_argument("--rank", type=positive, default=128, help=text)
    add_batch_size(parser)
    add_output(parser, "Folder for fggm_retention.safetensors.")


def run(args: Namespace) -> Result | None:
    """Read the input covariances of MODEL on text that it should retain.

    The file serves every task of the model: FGGMConfig(reference="FOLDER", harm_decay=80). It can be shared on the Hub
    and used as reference="OWNER/NAME".
    """
    require_free(args.output, args.overwrite)

    from ..selection import input_covariance
    from ..training.base_model import this_process
    from ..training.texts import text_batches

    tokenizer = base_model(args).load_tokenizer()
    batches = [text_batches(file, tokenizer, args.batch_size) for file in args.text]
    model = base_model(args).load()
    sources = [input_covariance(model, entry, args.num_samples, rank=args.rank) for entry in batches]
    total = sum(sources[1:], start=sources[0])
    if not this_process().is_main_process:
        return None
    file = total.save(args.output)
    size = file.stat().st_size
    data = {"model": args.model, "output": str(file), "bytes": size, "tokens": total.positions, "rank": total.rank}
    modules = f"{len(total.inputs)} modules with {len(total.covariances)} distinct inputs"
    return data, f"{total.positions} tokens, {modules}, {size / 2**20:.1f} MiB. Saved to {file}."
