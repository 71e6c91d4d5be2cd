"""Builds the program ``fggm`` from the modules of its commands, and runs one of them."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..tuner.files.hub import expanded
from ..version import __version__
from .messages import only_relevant

COMMANDS: tuple[str, ...] = ("select", "train", "eval", "sequence", "reference")
COMMANDS += ("inspect", "overlap", "diff", "merge", "export", "rollback", "doctor")


FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab's names of functions


def parser() -> ArgumentParser:
    """The program's options. The docstring of a command's ``run`` is its help."""
    program = ArgumentParser(
        "fggm",
        description="Fisher-Guided Gradient Masking: select the weights of a language model that a task needs, and "
        "train only those.",
    )
    program.add_argument("--version", action="version", version=f"fggm {__version__}")
    subparsers = program.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".{name}", __package__)
        description = inspect.cleandoc(module.run.__doc__)
        command = subparsers.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(command)
        command.add_argument("--json", action="store_true", help="Print only one JSON object to standard output.")
        text = "Show the traceback of an error, and the warnings of libraries."
        command.add_argument("--debug", action="store_true", help=text)
        for action in command._actions:
            if not action.choices:
                action.complete = FILES  # type: ignore[attr-defined]
        names = [str(action.metavar) for action in command._get_positional_actions()]
        names += [f"{a.option_strings[0]} {a.dest.upper()}" for a in command._get_optional_actions() if a.required]
        command.usage = " ".join(["%(prog)s", *names, "[OPTIONS]"])  # argparse would list a hundred options
        command.set_defaults(run=module.run, error=command.error)
    return program


def run_program(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Errors are one line and exit with 1, wrong usage with 2, and Ctrl-C with 130."""
    args = parser().parse_args(arguments)
    for name, value in vars(args).items():
        setattr(args, name, _with_paths(value))
    try:
        # libraries may print, but standard output is only for the result
        with contextlib.redirect_stdout(sys.stderr), contextlib.nullcontext() if args.debug else only_relevant():
            result = args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or "no message"
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"fggm: error: {message}", file=sys.stderr)
        sys.exit(1)
    if result is not None:  # None: another process prints it
        _print(args, *result)


def _print(args: Namespace, data: dict[str, Any], shown: Any) -> None:
    if args.json:
        finite = json.loads(json.dumps(data), parse_constant=lambda name: None)  # JSON has no NaN and no infinity
        print(json.dumps(finite, indent=2))
        return
    from rich.console import Console

    Console(markup=False, emoji=False).print(shown, crop=False)  # names are text, also "[/1]"


def _with_paths(value: Any) -> Any:
    """The value of an option with expanded paths. In ``--output=~/x`` the shell does not expand them."""
    if isinstance(value, list):
        return [_with_paths(entry) for entry in value]
    return type(value)(expanded(str(value))) if isinstance(value, (str, Path)) else value
