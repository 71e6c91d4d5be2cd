"""``fggm overlap``: compares the supports and values of adapters."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from itertools import combinations
from typing import TYPE_CHECKING

from .output import Result, require_adapter, table

if TYPE_CHECKING:
    from ..deltas.overlaps import Shared

HEADINGS = ("deltas", "module", "Jaccard", "by chance", "shared", "cosine there")


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
    from ..deltas import SparseDelta, overlap

    pairs, rows = [], []
    for (a, first), (b, second) in combinations([(name, SparseDelta.read(name)) for name in args.adapters], 2):
        result = overlap(first, second)
        modules = {path: module.to_dict() for path, module in result.modules.items()}
        pairs.append({"a": a, "b": b, **result.total.to_dict(), "modules": modules})
        shown = {"all": result.total, **(result.modules if args.modules else {})}
        rows += [(f"{a}, {b}", path, *_figures(module)) for path, module in shown.items()]
    return {"pairs": pairs}, table("Overlap of the supports, in weight entries", HEADINGS, rows)


def _figures(module: Shared) -> tuple[str, ...]:
    cosine = "" if module.cosine is None else f"{module.cosine:+.3f}"
    return f"{module.jaccard:.3f}", f"{module.chance:.3f}", f"{module.both:,}", cosine
