"""The base class of the pydantic models of a stream, and error messages of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from ..tuner.files import user_path


class StreamError(ValueError):
    """A stream that cannot be run. The message names the file and the field."""


def suggestions(name: str, legal: Sequence[str]) -> str:
    """The legal names, and the one that is most similar to an unknown name."""
    nearest = difflib.get_close_matches(str(name), legal, n=1)
    return f"legal are {', '.join(legal)}" + (f". Did you mean {nearest[0]!r}?" if nearest else "")


def require_known(names: Iterable[str], legal: Sequence[str], kind: str = "field") -> None:
    """Raise StreamError for the first unknown name."""
    for name in names:
        if name not in legal:
            raise StreamError(f"unknown {kind} {name!r}; {suggestions(name, legal)}")


class Settings(BaseModel):
    """Fields of a stream file. Unknown fields and values of a wrong type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    other_fields: ClassVar[tuple[str, ...]] = ()  # of a file; read_stream reads them

    @model_validator(mode="before")
    @classmethod
    def _require_known_fields(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and cls.model_config["extra"] == "forbid":
            require_known(values, [*cls.model_fields, *cls.other_fields])
        return values


def _folder_name(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ValueError("it names a folder, so it must not be empty, contain '/' or start with '.'")
    return name


def path_in_data(path: str, info: ValidationInfo) -> str:
    """The path, relative to the data folder of the stream file that is read."""
    return str((info.context or {}).get("data", Path()) / user_path(path))


FolderName = Annotated[str, AfterValidator(_folder_name)]
DataPath = Annotated[str, AfterValidator(path_in_data)]
Count = Annotated[int, Field(ge=1, strict=True)]
Positive = Annotated[float, Field(gt=0)]


def one_line(error: ValidationError) -> str:
    """A validation error in one line, such as ``tasks[0].epochs: must be greater than 0, got -1``."""
    problem = max(error.errors(), key=lambda each: len(each["loc"]))  # in a union, the alternative that fits best
    path = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part != "str":  # else the name of an alternative of a union
            path += f".{part}" if path else part
    match problem["type"]:
        case "missing":
            return f"{path} is missing"
        case "too_short" | "string_too_short":
            return f"{path} is empty"
        case "value_error":
            message = str(problem["ctx"]["error"])
            return f"{path}: {message}" if path else message
    message = problem["msg"].replace("Input should be", "must be").replace("valid tuple", "list")
    return f"{path}: {message}, got {problem['input']!r}"
