"""Finds the commands and makes one program of them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Annotated

import typer

from ..version import __version__
from .command import as_command

HELP = "Fisher-Guided Gradient Masking: choose which weights of a language model may move, and train those."


def build() -> typer.Typer:
    """The program, with a command for every module beside this one that has a function ``run``.

    The command has the module's name; its help is the docstring of ``run``, whose first line is the summary.
    """
    app = typer.Typer(name="fggm", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_program)
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f".{found.name}", __package__)
        if hasattr(module, "run"):
            app.command(found.name.replace("_", "-"))(as_command(module.run))
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fggm {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
