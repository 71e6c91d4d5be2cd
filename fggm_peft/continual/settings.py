"""Stream files: reading YAML and JSON, the base class of the pydantic models, and error messages of one line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo


class StreamError(ValueError):
    """A stream that cannot be run. The message names the file and the field."""


class Settings(BaseModel):
    """Fields of a stream file. Unknown fields and values of a wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _folder_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ValueError("it names a folder, so it must not be empty, contain '/' or start with '.'")
    return name


def path_in_data(path: str, info: ValidationInfo) -> str:
    """The path, relative to the data folder of the stream file that is read."""
    return str((info.context or {}).get("data", Path()) / Path(path).expanduser())


FolderName = Annotated[str, AfterValidator(_folder_name)]
DataPath = Annotated[str, AfterValidator(path_in_data)]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0)]


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, in which ``1e-4`` is a number, and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys and key.value != "<<":
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"duplicate key {duplicates[0]!r}")
    return dict(pairs)


def read_settings(path: Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file.

    Raises:
        StreamError: the file cannot be read; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        settings = json.loads(text, object_pairs_hook=_unique_keys) if is_json else yaml.load(text, _Loader)
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


def one_line(error: ValidationError, model: type[Settings], other_fields: Sequence[str] = ()) -> str:
    """A validation error in one line, such as ``tasks[0].epochs: must be greater than 0, got -1``.

    Args:
        model: the class that was validated.
        other_fields: legal fields of the file that are not fields of the class.
    """
    problem = max(error.errors(), key=lambda each: len(each["loc"]))  # in a union, the alternative that fits best
    path, cls = "", model
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part != "str":  # else the name of an alternative of a union
            path += f".{part}" if path else part
            legal = [*_fields(cls), *(other_fields if cls is model else ())]
            cls = _class_in(get_type_hints(cls).get(part)) if cls is not None else None
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{path}: unknown field; {suggestions(path.rpartition('.')[2], legal)}"
        case "missing":
            return f"{path} is missing"
        case "too_short" | "string_too_short":
            return f"{path} is empty"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{path}: {message}" if path else message
    message = problem["msg"].replace("Input should be", "must be").replace("valid tuple", "list")
    return f"{path}: {message}, got {problem['input']!r}"


def _fields(cls: Any) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "model_fields", ()))


def _class_in(annotation: Any) -> Any:
    """The class with fields in an annotation such as ``tuple[Task, ...]`` or ``Gate | None``."""
    if _fields(annotation):
        return annotation
    return next((cls for argument in get_args(annotation) if (cls := _class_in(argument))), None)


def suggestions(name: str, legal: Sequence[str]) -> str:
    """The legal names, and the one that is most similar to an unknown name."""
    nearest = difflib.get_close_matches(name, legal, n=1)
    return f"legal are {', '.join(legal)}" + (f". Did you mean {nearest[0]!r}?" if nearest else "")
