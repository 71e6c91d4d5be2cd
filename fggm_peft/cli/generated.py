"""Turns the fields of a dataclass into command-line options, so that a new field needs no further code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

import typer

SCALARS = {int, float, str, bool}
JSON_TYPES = {int, float, bool, dict, list}


def options_of(
    source: type,
    skip: Collection[str] = (),
    shown: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    help_length: int = 240,
) -> Callable[[type], Any]:
    """Decorator: makes a class a frozen dataclass with one option for each field of ``source``.

    The option has the field's name, type, default and help. An option that is not given is None.

    Args:
        source: a dataclass with help texts in ``metadata["help"]``.
        skip: fields without an option, in addition to those with ``init=False``.
        shown: fields that ``--help`` lists; None lists all.
        defaults: defaults that replace those of ``source`` in the help. A flag has a second form, ``--no-...``, unless
            its default is False.
        aliases: field -> a short name.
        help_length: help texts end with the last sentence within this length; the first sentence is always complete.
    """

    def decorate(group: type) -> Any:
        hints = get_type_hints(source)
        for field in fields(source):
            if field.init and field.name not in skip:
                default = (defaults or {}).get(field.name, field.default)
                info = {
                    "hidden": shown is not None and field.name not in shown,
                    "help": _help(field, default, help_length),
                }
                names = [option_name(name) for name in ((aliases or {}).get(field.name), field.name) if name]
                group.__annotations__[field.name] = _option(names, hints[field.name], default, info)
                setattr(group, field.name, None)
        return dataclass(frozen=True)(group)

    return decorate


def given_options(group: Any, source: type) -> dict[str, Any]:
    """The generated options that were given, as values for the fields of ``source``.

    Raises:
        typer.BadParameter: a text does not fit its field's type.
    """
    hints = get_type_hints(source)
    values = {field.name: getattr(group, field.name) for field in fields(group) if field.name in hints}
    return {name: read_value(value, hints[name], name) for name, value in values.items() if value not in (None, [])}


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def read_value(value: Any, annotation: Any, field: str) -> Any:
    """The value of an option, converted to its field's type.

    If a field has several types, its text is read as JSON if possible. A repeated option for "a list or a string" is a
    string if it is one regex or "all-linear". "none" stands for None, and so does "all" for a number.

    Raises:
        typer.BadParameter: the text fits none of the types.
    """
    types, words, is_optional = _members(annotation)
    if isinstance(value, list):
        return _names_or_pattern(value) if str in types else value
    if not isinstance(value, str) or types <= {str} or value in words:
        return value
    if is_optional and value in ("none", "all") and str not in types:
        return None
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = None
    if type(parsed) in types or (type(parsed) is int and float in types):
        return parsed
    if str in types:
        return value
    names = sorted("a JSON object" if kind is dict else kind.__name__ for kind in types & JSON_TYPES)
    raise typer.BadParameter(f"{value!r} is not {' or '.join([*words, *names])}", param_hint=option_name(field))


def _members(annotation: Any) -> tuple[set[Any], list[str], bool]:
    """The types and the literal words that a field accepts, and whether it accepts None."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    types = {get_origin(member) or member for member in members} - {Literal, NoneType}
    if types.isdisjoint(SCALARS | JSON_TYPES) and not words:
        types |= {str, dict}  # a class that is built from its name or a dict, such as a granularity
    return types, [word for word in words if isinstance(word, str)], NoneType in members


def _names_or_pattern(texts: list[str]) -> list[str] | str:
    if len(texts) == 1 and (texts[0] == "all-linear" or re.search(r"[*+?|()\[\]{}^$\\]", texts[0])):
        return texts[0]
    return [name for text in texts for name in text.split(",")]


def _help(field: Field, default: Any, length: int) -> str:
    text, *sentences = re.split(r"(?<=[.!?]) (?=[A-Z`'])", " ".join(field.metadata.get("help", "").split()))
    for sentence in sentences:
        if len(text) + len(sentence) > length:
            break
        text = f"{text} {sentence}"
    if not isinstance(default, bool) and default not in (None, MISSING, ""):
        text = f"{text.rstrip('.')} (default: {getattr(default, 'value', default)})."
    return text.replace("%%", "%").replace("[", r"\[")  # rich reads brackets as markup


def _option(names: list[str], annotation: Any, default: Any, info: dict[str, Any]) -> Any:
    types, words, _ = _members(annotation)
    kind: Any = str
    if list in types and types <= {list, str}:
        kind, info["metavar"] = list[str], "<str>"
    elif words and not types:
        kind = Literal[tuple(words)]
    elif len(types) == 1 and not words and types <= SCALARS:
        (kind,) = types
    elif str not in types:
        forms = [*words, *sorted(kind.__name__ for kind in types & {int, float})]
        info["metavar"] = "|".join([*forms, *(["JSON"] if types - {int, float} else [])])
    if kind is bool:
        names[0] += "" if default is False else f"/--no-{names[0][2:]}"
    return Annotated[Optional[kind], typer.Option(*names, **info)]
