"""Reads a stream from a file, from a mapping, or by the name of a stream that the package contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..training.rows import read_fields
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
    name, folder = "the stream", Path.cwd()
    try:
        if not isinstance(source, Mapping):
            path = _stream_file(source)
            name, folder = str(path), path.parent.absolute()
            source = read_fields(path)
        given = {field: _absolute(field, value) for field, value in overrides.items() if value is not None}
        fields: dict[str, Any] = {**source, **given}
        if "learning_rates" in given and isinstance(fields.get("methods"), list):
            fields["methods"] = [_without_rates(method) for method in fields["methods"]]
        data = folder / user_path(fields.pop("data", None) or ".")
        defaults, tasks = fields.pop("task_defaults", None) or {}, fields.get("tasks")
        if not isinstance(defaults, Mapping):
            raise StreamError(f"task_defaults must be fields of tasks, got {defaults!r}")
        require_known(defaults, list(Task.model_fields), "field of task_defaults")
        if isinstance(tasks, list):
            fields["tasks"] = [{**defaults, **task} if isinstance(task, Mapping) else task for task in tasks]
        return Stream.model_validate(fields, context={"folder": folder, "data": data})
    except ValidationError as error:
        raise StreamError(f"{name}: {one_line(error)}") from error
    except (ValueError, OSError) as error:  # for example, a path that is too long
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
