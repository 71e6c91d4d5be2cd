"""``fggm verify``: checks an adapter's file, and whether it fits a base model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .output import Result, add_adapter, facts_table, require_adapter


def add_options(parser: ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--base", "-b", help="Folder or Hub id of the base that the adapter should fit.")


def run(args: Namespace) -> Result:
    """Check every tensor of ADAPTER, without loading it into a model.

    With --base, the command loads the base and checks that the adapter was made on it. An error names the file and the
    tensor.
    """
    require_adapter(args.adapter)
    from ..deltas import verify

    data = verify(args.adapter, args.base).to_dict()
    versions = [f"{name} {version}" for name, version in sorted(data["made_with"].items())]
    return data, facts_table(f"{args.adapter} is valid", {**data, "made_with": versions})
