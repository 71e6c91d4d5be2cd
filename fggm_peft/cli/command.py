"""Makes a command of a function: options in groups, one result as a table or as JSON, errors in one line.

A function ``run`` takes dataclasses as parameters; each field of them becomes an option. It returns a
``Result``, or None where another process shows it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo


@dataclass(frozen=True)
class Result:
    """What a command found.

    Args:
        data: for ``--json``; plain types only.
        shown: for people: whatever rich can print.
    """

    data: dict[str, Any]
    shown: Any


@dataclass(frozen=True)
class OutputOptions:
    """How the result and errors are shown; every command has these."""

    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to standard output, and nothing else.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False


def as_command(run: Callable[..., Result | None]) -> Callable[..., None]:
    """The function as typer takes it, with the options that every command has."""
    groups = {"output_options": OutputOptions, **_groups(run)}

    def command(**options: Any) -> None:
        arguments = {
            name: group(**{f.name: options.pop(f.name) for f in fields(group)}) for name, group in groups.items()
        }
        shown = arguments.pop("output_options")
        with _one_line_errors(shown.debug):
            # libraries print what they like; standard output belongs to the result
            with contextlib.redirect_stdout(sys.stderr):
                result = run(**arguments, **options)
            if result is not None:
                _show(result, shown.json)

    parameters = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.name not in groups]
    parameters += [p for group in groups.values() for p in _parameters(group)]
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    command.__doc__, command.__name__ = _reflowed(run.__doc__ or ""), run.__name__
    return command


def _reflowed(docstring: str) -> str:
    """Each paragraph in one line, which rich breaks to the width of the terminal."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(docstring).split("\n\n"))


def _groups(run: Callable[..., Any]) -> dict[str, type]:
    parameters = inspect.signature(run, eval_str=True).parameters
    return {name: p.annotation for name, p in parameters.items() if _is_group(p.annotation)}


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and is_dataclass(annotation)


def _parameters(group: type) -> list[inspect.Parameter]:
    """One parameter for each field, in a help panel that the first line of the group's docstring names."""
    hints = get_type_hints(group, include_extras=True)
    panel = (group.__doc__ or group.__name__).splitlines()[0].partition(";")[0].rstrip(".")
    result = []
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation = _in_panel(hints[field.name], panel)
        result.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return result


def _in_panel(annotation: Any, panel: str) -> Any:
    assert get_origin(annotation) is Annotated, annotation
    kind, info = get_args(annotation)
    info = copy.copy(info)
    if isinstance(info, OptionInfo):
        info.rich_help_panel = panel
    return Annotated[kind, info]


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if debug or isinstance(error, (typer.Exit, typer.BadParameter)):
            raise
        print(f"fggm: error: {_message(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


def _message(error: Exception) -> str:
    """In one line; an error whose author did not write to a user is named, with the way to its traceback."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _show(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_finite(result.data), indent=2, allow_nan=False))
        return
    from rich.console import Console

    Console().print(result.shown, crop=False)


def _finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
