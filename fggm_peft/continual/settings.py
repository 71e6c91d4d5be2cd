"""From the text of a file to dataclasses: every field known, of its type, and named in the error where it is not."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class StreamError(ValueError):
    """A description of a stream that cannot be run; names the file and the field."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2, in which 1e-4 is one, and without keys that are there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file.

    Raises:
        StreamError: it cannot be read; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = (
            json.loads(text, object_pairs_hook=_without_twins) if path.suffix == ".json" else yaml.load(text, _Loader)
        )
    except json.JSONDecodeError as error:
        raise StreamError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StreamError(f"{path}{line}: not YAML: {error.problem or error.context}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StreamError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise StreamError(f"{path} must have fields, such as model, methods and tasks")
    return settings


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value, which must have fields."""
    if not isinstance(value, Mapping):
        raise StreamError(f"{where} must have fields, got {value!r}")
    return value


def built(
    kind: type[T],
    value: Any,
    where: str,
    readers: Mapping[str, Callable[[Any], Any]] | None = None,
    without: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> T:
    """The dataclass ``kind`` with the fields of a mapping, each checked against its type or made by its reader."""
    if isinstance(value, kind):
        return value
    names = {entry.name: entry for entry in fields(kind) if entry.name not in without}  # type: ignore[arg-type]
    prefix = f"{where}: " if where else ""
    settings = mapping(value, where)
    if unknown := [name for name in settings if name not in names]:
        raise StreamError(f"{prefix}unknown field {unknown[0]!r}; {listed(unknown[0], [*names, *also])}")
    required = [name for name, entry in names.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if missing := [name for name in required if settings.get(name) is None]:
        raise StreamError(f"{prefix}{missing[0]} is missing")
    hints, read = get_type_hints(kind), readers or {}
    values = {
        name: read[name](entry) if name in read else _typed(entry, hints[name], f"{prefix}{name}")
        for name, entry in settings.items()
    }
    try:
        return kind(**values)
    except StreamError as error:
        raise StreamError(f"{prefix}{error}") from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value as the type of a field wants it: whole numbers for float, numbers that YAML took for texts, tuples."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        plain = get_origin(option) or option
        if plain is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(entry, get_args(option)[0], f"{where}[{i}]") for i, entry in enumerate(value))
        if plain is float and (number := _number(value)) is not None:
            return number
        if plain is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if plain in (str, bool) and isinstance(value, plain):
            return value
        if plain is Mapping and isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values()):
            return dict(value)
    words = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", tuple: "a list"}
    wanted = [words[get_origin(o) or o] for o in options if (get_origin(o) or o) in words]
    raise StreamError(f"{where} must be {' or '.join(wanted)}, got {value!r}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def listed(name: object, known: list[str]) -> str:
    """The known names, and the one that is most like an unknown one."""
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f"known are {', '.join(known)}" + (f". Did you mean {nearest[0]!r}?" if nearest else "")
