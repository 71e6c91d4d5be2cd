"""Reads a stream from a file, a mapping, or by the name of one that comes with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..training.base_model import DTYPES, QUANTIZATIONS, BaseModel
from ..tuner.files.hub import may_be_hub_id
from .gate import Gate
from .general import General
from .metrics import METRICS, MetricError, load_metric
from .settings import StreamError, built, mapping, read_settings
from .stream import Method, Stream, Training
from .task import Split, Task

OPTIONS_WITH_PATHS = {"reference", "protect"}  # of the method fggm
READY = Path(__file__).parent / "streams"
T = TypeVar("T")


def ready_streams() -> list[str]:
    """Names of the streams that come with the package."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def read_stream(source: str | Path | Mapping[str, Any], **given: Any) -> Stream:
    """The stream of a YAML or JSON file, of a mapping with its fields, or of a name from ``ready_streams``.

    A file has the fields of ``Stream``, and two more: ``data`` is the folder that the paths of tasks and of the general
    text start from, and ``task_defaults`` has fields for the tasks that do not say otherwise. Without ``data``, and for
    the model, paths start from the file's folder.

    Args:
        given: fields that go before those of the file, such as ``model`` and ``data``; their paths start from here.

    Raises:
        StreamError: the file cannot be read, a field is unknown, missing or has a wrong value, or data is missing.
            One line that names file and field.
    """
    if isinstance(source, Mapping):
        where, folder, settings = "the stream", Path.cwd(), dict(source)
    else:
        path = _stream_file(source)
        where, folder, settings = str(path), path.parent.absolute(), read_settings(path)
    try:
        settings["data"] = str(_path(settings.get("data") or ".", folder, "data"))
        settings |= {name: _from_here(name, value) for name, value in given.items() if value is not None}
        return _stream(settings, folder)
    except StreamError as error:
        raise StreamError(f"{where}: {error}") from error


def _stream_file(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if not path.is_file() and str(source) in ready_streams():
        return READY / f"{source}.yaml"
    if not path.is_file():
        raise StreamError(f"no file {str(source)!r}; ready streams are {', '.join(ready_streams())}")
    return path


def _from_here(name: str, value: Any) -> Any:
    if name == "data" or (name == "model" and isinstance(value, (str, Path)) and Path(value).is_dir()):
        return str(Path(value).absolute())
    return value


def _stream(settings: dict[str, Any], folder: Path) -> Stream:
    data, defaults = Path(settings.pop("data")), settings.pop("task_defaults", None)
    readers = {
        "model": lambda value: _model(value, folder),
        "tasks": lambda value: _each(value, "tasks", lambda entry, at: _task(entry, at, data, defaults)),
        "methods": lambda value: _each(value, "methods", lambda entry, at: _method(entry, at, data)),
        "training": lambda value: built(Training, value, "training"),
        "orders": lambda value: _each(value, "orders", _order),
        "general": lambda value: None if value is None else _general(value, data),
        "gate": lambda value: None if value is None else built(Gate, value, "gate", {"keep": _shares}),
    }
    return built(Stream, settings, "", readers, also=("data", "task_defaults"))


def _each(value: Any, where: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    if not isinstance(value, (list, tuple)):
        raise StreamError(f"{where} must be a list, got {value!r}")
    return tuple(read(entry, f"{where}[{number}]") for number, entry in enumerate(value))


def _model(value: Any, folder: Path) -> BaseModel:
    settings = {"name": value} if isinstance(value, (str, Path)) else value
    # whether code of a checkpoint runs is for who starts the run to say, not for a file that may come from anywhere
    model = built(BaseModel, settings, "model", without=("trust_remote_code",))
    for name, known in (("dtype", DTYPES), ("quantization", (*QUANTIZATIONS, None))):
        if getattr(model, name) not in known:
            raise StreamError(
                f"model.{name} is {getattr(model, name)!r}; it must be one of {', '.join(map(str, known))}"
            )
    path = _path(model.name, folder, "model")
    if path.is_dir():
        return replace(model, name=str(path))
    if not may_be_hub_id(model.name):
        raise StreamError(f"model: no folder {path}")
    return model


def _task(value: Any, where: str, data: Path, defaults: Any) -> Task:
    if isinstance(value, Task):
        return value
    name = value.get("name") if isinstance(value, Mapping) else None
    where = f"{where} ({name})" if isinstance(name, str) else where
    if defaults is not None and isinstance(value, Mapping):
        built(
            Task, {"name": "x", "path": "x", **mapping(defaults, "task_defaults")}, "task_defaults", without=("rows",)
        )
        value = {**defaults, **value}
    readers = {"path": lambda path: _task_path(path, data, where)}
    task = built(Task, value, where, readers, without=("rows",))
    try:
        task.check_files()
    except StreamError as error:
        raise StreamError(f"{where}: {error}. Paths of tasks start from data, which is {data}") from error
    if task.metric not in METRICS:
        try:
            load_metric(task.metric)  # hours before the first score is needed
        except MetricError as error:
            raise StreamError(f"{where}: metric: {error}") from error
    return task


def _task_path(value: Any, data: Path, where: str) -> Split:
    if isinstance(value, Mapping):
        return {split: str(_path(path, data, f"{where}: path")) for split, path in value.items()}
    return str(_path(value, data, f"{where}: path"))


def _method(value: Any, where: str, data: Path) -> Method:
    if isinstance(value, Method):
        return value
    settings = {"name": value} if isinstance(value, str) else dict(mapping(value, where))
    name = settings.pop("name", None)
    label = settings.pop("label", name)
    if not isinstance(name, str) or not isinstance(label, str) or not name or not label or "/" in label:
        raise StreamError(f"{where} needs a name, and a label that can name a folder, got {value!r}")
    for option in OPTIONS_WITH_PATHS & settings.keys():
        settings[option] = _found_in(data, settings[option])
    return Method(name, label, settings)


def _found_in(data: Path, value: Any) -> Any:
    """A name or a list of names; those that name something in ``data`` as paths."""
    if isinstance(value, list):
        return [_found_in(data, entry) for entry in value]
    return str(data / value) if isinstance(value, str) and (data / value).exists() else value


def _order(value: Any, where: str) -> str | tuple[str, ...]:
    names = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(name, str) for name in names):
        raise StreamError(f"{where} must be a name or a list of tasks, got {value!r}")
    return value if isinstance(value, str) else tuple(names)


def _general(value: Any, data: Path) -> General:
    readers = {
        name: lambda path, name=name: None if path is None else str(_path(path, data, f"general.{name}"))
        for name in ("text", "lm_eval_include")
    }
    general = built(General, value, "general", readers)
    try:
        general.check()
    except StreamError as error:
        raise StreamError(f"general.{error}") from error
    return general


def _shares(value: Any) -> Mapping[str, float]:
    return dict(mapping(value, "gate: keep"))


def _path(value: Any, start: Path, where: str) -> Path:
    if not isinstance(value, (str, Path)):
        raise StreamError(f"{where} must be a path, got {value!r}")
    return start / Path(value).expanduser()
