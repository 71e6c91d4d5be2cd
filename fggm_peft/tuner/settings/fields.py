"""The two kinds of fields of ``FGGMConfig``: settings of the user, and values that the library writes."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
import typing
from types import UnionType
from typing import Any

_types_of = functools.cache(typing.get_type_hints)


def setting(default: Any, help_text: str) -> Any:
    """A keyword of the config."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def written(help_text: str) -> Any:
    """A value that the library writes: saved and restored with the config, but not a keyword."""
    help_text = f"{help_text} Written by the library."
    return dataclasses.field(default=None, init=False, metadata={"help": help_text})


def is_integer(value: Any, least: int) -> bool:
    """Whether the value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def require_types(config: Any) -> None:
    """Raise ``ValueError`` for a field of a dataclass whose value does not have the annotated type."""
    types = _types_of(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not fits(value, types[field.name]):
            raise ValueError(f"{field.name} must be of type {field.type}, got {value!r:.80}")


def require_patterns(name: str, patterns: Any) -> None:
    """Raise ``ValueError`` for a name or pattern that is empty or not a regex; PEFT uses module names as regexes."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is not a valid regex: {error}") from error
        if not pattern:
            raise ValueError(f"{name} must not contain an empty name")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type of an annotation. A list may also be a tuple or a set, and a float an integer."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind)
