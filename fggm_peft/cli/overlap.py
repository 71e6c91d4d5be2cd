"""``fggm overlap``: compares the supports and values of adapters."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .output import Result, require_adapter


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="Folders or Hub ids of FGGM adapters.")
    parser.add_argument("--modules", action="store_true", help="Also show every module.")


def run(args: Namespace) -> Result:
    """Compare the supports and values of several adapters of one base, pair by pair.

    The Jaccard index counts the weight entries that both adapters may change. The expected index of random supports of
    the same sizes is shown beside it. The cosine compares the values on the shared entries.
    """
    if len(args.adapters) < 2:
        args.error("name at least two adapters")
    for adapter in args.adapters:
        require_adapter(adapter)
    from ..deltas import overlap

    result = overlap(*args.adapters)
    return {"adapters": args.adapters, **result.to_dict()}, result.table(by_module=args.modules)
