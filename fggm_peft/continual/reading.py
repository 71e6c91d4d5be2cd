"""Reads a stream from a file, from a mapping, or by the name of a stream that the package contains."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..tuner.files import user_path
from .settings import StreamError, one_line, require_known
from .stream import Stream
from .task import Task

READY = Path(__file__).parent / "streams"


def ready_streams() -> list[str]:
    """Names of the streams that the package contains."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def read_stream(source: str | Path | Mapping[str, Any], **overrides: Any) -> Stream:
    """The stream of a YAML or JSON file, of a mapping with its fields, or of a name from ``ready_streams``.

    A file contains the fields of ``Stream`` and two more: ``data`` is the folder for the relative paths of the tasks
    and of the general text, and ``task_defaults`` contains fields for tasks that do not set them. Without ``data``,
    and for the model, paths are relative to the folder of the file.

    Args:
        overrides: fields that override those of the file, such as ``model`` and ``data``; None is ignored. Their
            paths are relative to the working directory.

    Raises:
        StreamError: the file cannot be read, a field is unknown, missing or wrong, or data is missing. The message is
            one line that names the file and the field.
    """
    if isinstance(source, Mapping):
        name, folder, fields = "the stream", Path.cwd(), dict(source)
    else:
        path = _stream_file(source)
        name, folder, fields = str(path), path.parent.absolute(), _read_file(path)
    fields |= {field: _absolute(field, value) for field, value in overrides.items() if value is not None}
    if overrides.get("learning_rates") and isinstance(fields.get("methods"), list):
        fields["methods"] = [_without_rates(method) for method in fields["methods"]]
    data = folder / user_path(fields.pop("data", None) or ".")
    defaults, tasks = fields.pop("task_defaults", None) or {}, fields.get("tasks")
    if not isinstance(defaults, Mapping):
        raise StreamError(f"{name}: task_defaults must be fields of tasks, got {defaults!r}")
    if isinstance(tasks, list):
        fields["tasks"] = [{**defaults, **task} if isinstance(task, Mapping) else task for task in tasks]
    try:
        require_known(defaults, list(Task.model_fields), "field of task_defaults")
        return Stream.model_validate(fields, context={"folder": folder, "data": data})
    except ValidationError as error:
        raise StreamError(f"{name}: {one_line(error)}") from error
    except (StreamError, OSError) as error:  # for example, a path that is too long
        raise StreamError(f"{name}: {error}") from error


def _without_rates(method: Any) -> Any:
    return {k: v for k, v in method.items() if k != "learning_rates"} if isinstance(method, Mapping) else method


def _stream_file(source: str | Path) -> Path:
    path = user_path(source)
    if path.is_file():
        return path
    if str(source) in ready_streams():
        return READY / f"{source}.yaml"
    raise StreamError(f"no file {str(source)!r}; ready streams are {', '.join(ready_streams())}")


def _absolute(field: str, value: Any) -> Any:
    if field == "data" or (field == "model" and isinstance(value, (str, Path)) and user_path(value).is_dir()):
        return str(user_path(value).absolute())
    return value


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, in which ``1e-4`` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_file(path: Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file; an error names the line."""
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        json.dumps(fields, ensure_ascii=False, skipkeys=True, default=str).encode()  # text without half surrogate pairs
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise StreamError(f"{path}{line}: not YAML: {error.problem or error.context}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StreamError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise StreamError(f"{path} must have fields, such as model, methods and tasks")
    return fields
