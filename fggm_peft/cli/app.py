"""Builds the program ``fggm`` from the modules in this folder.

A command is a function ``run``. Its parameters are options, or dataclasses whose fields are options. It returns a
``Result``, or None if another process prints it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from ..version import __version__
from .output import Result

HELP = "Fisher-Guided Gradient Masking: select the weights of a language model that a task needs, and train only those."


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    json: Annotated[bool, typer.Option("--json", help="Print only one JSON object to standard output.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def build() -> typer.Typer:
    """The program. A command is named after its module, and its help is the docstring of ``run``."""
    app = typer.Typer(name="fggm", help=HELP, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_program)
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f".{info.name}", __package__)
        if hasattr(module, "run"):
            app.command(info.name.replace("_", "-"))(as_command(module.run))
    return app


def _show_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"fggm {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def as_command(run: Callable[..., Result | None]) -> Callable[..., None]:
    """The function with the signature that typer reads, and with the options that every command has."""
    parameters = inspect.signature(run, eval_str=True).parameters.values()
    groups: dict[str, Any] = {"output_options": OutputOptions}
    groups |= {
        p.name: p.annotation for p in parameters if isinstance(p.annotation, type) and is_dataclass(p.annotation)
    }

    def command(**options: Any) -> None:
        arguments = {
            name: group(**{field.name: options.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        output = arguments.pop("output_options")
        with _one_line_errors(output.debug):
            # standard output is for the result only, whatever libraries print
            with contextlib.redirect_stdout(sys.stderr):
                result = run(**arguments, **options)
            if result is not None:
                _print(result, output.json)

    signature = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name not in groups]
    signature += [p for group in groups.values() for p in _parameters(group)]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    # each paragraph in one line, since rich wraps lines to the width of the terminal
    paragraphs = inspect.cleandoc(run.__doc__ or "").split("\n\n")
    command.__doc__, command.__name__ = "\n\n".join(" ".join(text.split()) for text in paragraphs), run.__name__
    return command


def _parameters(group: type) -> list[inspect.Parameter]:
    """One parameter per field, in a help panel with the first line of the group's docstring as its title."""
    hints = get_type_hints(group, include_extras=True)
    panel = (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
    parameters = []
    for field in fields(group):
        kind, info = get_args(hints[field.name])
        info = copy.copy(info)
        if isinstance(info, OptionInfo):
            info.rich_help_panel = panel
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
            )
        )
    return parameters


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if debug or isinstance(error, (typer.Exit, typer.BadParameter)):
            raise
        message = " ".join(str(error).split()) or "no message"
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"fggm: error: {message}", file=sys.stderr)
        raise typer.Exit(1) from error


def _print(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(result.data), indent=2, allow_nan=False))
        return
    from rich.console import Console

    Console().print(result.shown, crop=False)


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
