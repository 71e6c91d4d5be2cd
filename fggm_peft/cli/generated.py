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
) -> Callable[[type], Any]:
    """Decorator: makes a class a frozen dataclass with one option for each field of ``source``.

    The option's name, type, default and help are those of the field. An option that is not given is None.

    Args:
        source: a dataclass with help texts in ``metadata["help"]``.
        skip: fields that get no option. Fields with ``init=False`` never get one.
        shown: fields that ``--help`` lists; None is all of them.
        defaults: defaults that replace those of ``source`` in the help. A flag whose default is not False has a
            second form, ``--no-...``.
        aliases: field -> a second, shorter name.
    """

    def decorate(group: type) -> Any:
        hints = get_type_hints(source)
        for field in fields(source):
            if field.init and field.name not in skip:
                default = (defaults or {}).get(field.name, field.default)
                alias = (aliases or {}).get(field.name)
                is_hidden = shown is not None and field.name not in shown
                group.__annotations__[field.name] = _option(field, hints[field.name], default, alias, is_hidden)
                setattr(group, field.name, None)
        return dataclass(frozen=True)(group)

    return decorate


def given_options(group: Any, source: type) -> dict[str, Any]:
    """The generated options of a group that were given, as values of their fields in ``source``.

    Raises:
        typer.BadParameter: a text cannot be read as its field's type.
    """
    hints = get_type_hints(source)
    values = {field.name: getattr(group, field.name) for field in fields(group) if field.name in hints}
    return {name: read_value(value, hints[name], name) for name, value in values.items() if value not in (None, [])}


def option_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def read_value(value: Any, annotation: Any, field: str) -> Any:
    """The value of an option as its field's type; a text for a field of several types is read as JSON if possible.

    A repeated option for a list or one string is that string if it is a regex or "all-linear". "none", and "all" for
    a number, stand for None.

    Raises:
        typer.BadParameter: the text has none of the types.
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
    forms = [
        *words,
        *sorted("a JSON object" if kind is dict else kind.__name__ for kind in types if kind in JSON_TYPES),
    ]
    raise typer.BadParameter(f"{value!r} is not {' or '.join(forms)}", param_hint=option_name(field))


def _members(annotation: Any) -> tuple[set[Any], list[str], bool]:
    """The types and the literal words that a field accepts, and whether it accepts None."""
    is_union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if is_union else (annotation,)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    types = {get_origin(member) or member for member in members} - {Literal, NoneType}
    if types.isdisjoint(SCALARS | JSON_TYPES) and not words:
        types |= {str, dict}  # a class that is built from its name or a dict, such as a granularity
    return types, [word for word in words if isinstance(word, str)], NoneType in members


def _names_or_pattern(texts: list[str]) -> list[str] | str:
    if len(texts) == 1 and (texts[0] == "all-linear" or re.search(r"[*+?|()\[\]{}^$\\]", texts[0])):
        return texts[0]
    return [name for text in texts for name in text.split(",")]


def _option(field: Field, annotation: Any, default: Any, alias: str | None, is_hidden: bool) -> Any:
    types, words, _ = _members(annotation)
    kind: Any = str
    metavar = None
    if list in types and types <= {list, str}:
        kind, metavar = list[str], "<str>"
    elif words and not types:
        kind = Literal[tuple(words)]
    elif len(types) == 1 and not words and types <= SCALARS:
        (kind,) = types
    elif str not in types:
        forms = [*words, *sorted(kind.__name__ for kind in types & {int, float})]
        metavar = "|".join([*forms, *(["JSON"] if types - {int, float} else [])])
    names = [option_name(field.name)]
    if kind is bool and default is False:
        names = [names[0]]
    elif kind is bool:
        names = [f"{names[0]}/--no-{names[0][2:]}"]
    if alias is not None:
        names.append(option_name(alias))
    help = _first_sentence(field.metadata.get("help", ""))
    if not isinstance(default, bool) and default not in (None, MISSING, "") and "(default:" not in help:
        help = f"{help.rstrip('.')} (default: {getattr(default, 'value', default)})."
    return Annotated[Optional[kind], typer.Option(*names, help=help, metavar=metavar, hidden=is_hidden)]


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z`'])", " ".join(text.split()), maxsplit=1)[0]
    return sentence.replace("%%", "%").replace("[", r"\[")  # rich reads brackets as markup
