"""Reads a stream from a file, from a mapping, or by the name of a stream that the package contains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .settings import Settings, StreamError, one_line, read_settings
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
        name, folder, settings = "the stream", Path.cwd(), dict(source)
    else:
        path = _stream_file(source)
        name, folder, settings = str(path), path.parent.absolute(), read_settings(path)
    settings |= {field: _absolute(field, value) for field, value in overrides.items() if value is not None}
    data = folder / Path(settings.pop("data", None) or ".").expanduser()
    defaults = settings.pop("task_defaults", None)
    context = {"folder": folder, "data": data}
    try:
        if defaults is not None:
            _validated(Task, {"name": "x", "dataset": "x", **defaults}, context, prefix="task_defaults.")
            if isinstance(settings.get("tasks"), list):
                tasks = settings["tasks"]
                settings["tasks"] = [{**defaults, **task} if isinstance(task, Mapping) else task for task in tasks]
        return _validated(Stream, settings, context)
    except StreamError as error:
        raise StreamError(f"{name}: {error}") from error


def _validated(model: type[Settings], values: Mapping[str, Any], context: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return model.model_validate(values, context=dict(context))
    except ValidationError as error:
        other_fields = ("data", "task_defaults") if model is Stream else ()
        raise StreamError(prefix + one_line(error, model, other_fields)) from error


def _stream_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in ready_streams():
        return READY / f"{source}.yaml"
    if not path.is_file():
        raise StreamError(f"no file {str(source)!r}; ready streams are {', '.join(ready_streams())}")
    return path


def _absolute(field: str, value: Any) -> Any:
    if field == "data" or (field == "model" and isinstance(value, (str, Path)) and Path(value).is_dir()):
        return str(Path(value).absolute())
    return value
