"""``Ledger``: the tasks of a model in order, in a folder from which any task can be removed again.

The folder contains ``ledger.json`` (names and digests, in order), ``deltas/`` (a PEFT adapter for each task) and, after
the tasks were merged into a model, ``originals.safetensors``: the base's entries that the tasks change.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import AdapterFileError
from ..tuner.files.atomic import digest_of_folder, file_name, write_json
from ..tuner.files.hub import user_path
from ..tuner.merging.merge import MergeReport
from ..tuner.merging.sidecar import sidecar_deltas
from .apply import apply_deltas, layers_to_change
from .delta import SparseDelta
from .originals import Originals, read_originals, remove_task_, write_originals

FILE = "ledger.json"
ORIGINALS = "originals.safetensors"
_FORMAT = "fggm_ledger 1"
_NAME = re.compile(r"\w[\w.-]*")


class Ledger:
    """The tasks of a model, in a folder.

    Args:
        folder: created by the first ``add``.

    Raises:
        ValueError: the ledger in the folder is damaged, or has an unknown format.
    """

    def __init__(self, folder: str | Path):
        self.folder = user_path(folder)
        self._digests: dict[str, str] = {}  # name of a task -> digest of its folder, in order
        if (file := self.folder / FILE).is_file():
            self._digests = _read(file)

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, tasks={self.tasks})"

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in order."""
        return list(self._digests)

    def delta(self, task: str) -> SparseDelta:
        """The delta of a task; raises ``AdapterFileError`` if its files have changed since it was added."""
        self._require(task)
        folder = self._folder(task)
        if not folder.is_dir() or digest_of_folder(folder) != self._digests[task]:
            raise AdapterFileError(
                f"the delta of {task!r} in {folder} has changed since it was added: files are missing or differ"
            )
        return SparseDelta.read(folder)

    def add(self, task: str, delta: Any) -> None:
        """Append a task; its delta is copied into the folder.

        Args:
            task: letters, digits, ``-``, ``_`` and ``.``.
            delta: what ``SparseDelta.read`` accepts.

        Raises:
            ValueError: the name is taken or illegal, or the delta has whole tensors, which cannot be removed again.
        """
        if not _NAME.fullmatch(task):
            raise ValueError(f"the name of a task may contain letters, digits, '-', '_' and '.', not {task!r}")
        if task.casefold() in map(str.casefold, self._digests):  # some file systems ignore case
            raise ValueError(f"{self.folder} has a task {task!r} already; roll it back first, or use another name")
        source = SparseDelta.read(delta)
        if whole := source.whole_tensors:
            raise ValueError(
                f"the delta of {task!r} has whole tensors ({whole[0]}, ...). They are not differences and could not be "
                "removed again"
            )
        folder = self._folder(task)
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted attempt
        SparseDelta(source.config, source.modules).save(folder)
        self._write({**self._digests, task: digest_of_folder(folder)})

    def apply(self, model: nn.Module) -> MergeReport:
        """Merge the tasks into a base model, in place and in order.

        The base's entries that the tasks change are saved in the folder, so ``rollback`` needs no base.

        Args:
            model: the base, without adapters. Its quantized layers get the deltas as sidecars.

        Raises:
            ValueError: a delta does not fit the model, or the saved originals belong to another base. Then the model
                is not the base, or tasks are merged already.
            AdapterFileError: a delta has changed since it was added.
        """
        deltas = [self.delta(task) for task in self.tasks]
        if not deltas:
            raise ValueError(f"there is no task in {self.folder} to apply")
        layers, file = layers_to_change(model, deltas), self.folder / ORIGINALS
        is_base = all(saved.are_in(layers[path]) for path, saved in read_originals(file).items() if path in layers)
        if not is_base or any(sidecar_deltas(layer.get_base_layer()) for layer in layers.values()):
            raise ValueError(f"{file} belongs to another base: pass the base model itself, without merged deltas")
        originals = {
            path: Originals.of(layer, [delta.modules[path] for delta in deltas if path in delta.modules])
            for path, layer in layers.items()
            if layer.quantization_backend is None
        }
        write_originals(file, originals)
        return apply_deltas(model, deltas)

    def rollback(self, task: str, model: nn.Module, remove: bool = True) -> None:
        """Remove a task from the model that ``apply`` merged the tasks into, in place, and from the ledger.

        The model then equals, bit for bit, the model without the task.

        Args:
            task: any task, not only the last one.
            model: the merged model.
            remove: whether to remove the task from the ledger; False lets you save the model first.

        Raises:
            ValueError: there is no such task, the model is not the base with the ledger's tasks, or there are no
                originals. Nothing has changed then.
        """
        self._require(task)
        deltas = {name: self.delta(name) for name in self.tasks}
        layers = layers_to_change(model, list(deltas.values()))
        remove_task_(model, layers, deltas, task, read_originals(self.folder / ORIGINALS))
        if remove:
            self.remove(task)

    def remove(self, task: str) -> None:
        """Remove a task and its delta from the ledger only."""
        self._require(task)
        self._write({name: digest for name, digest in self._digests.items() if name != task})
        shutil.rmtree(self._folder(task), ignore_errors=True)

    def _folder(self, task: str) -> Path:
        return self.folder / "deltas" / file_name(task)

    def _require(self, task: str) -> None:
        if task not in self._digests:
            known = ", ".join(self.tasks) or "none"
            raise ValueError(f"there is no task {task!r} in {self.folder}; its tasks: {known}")

    def _write(self, digests: dict[str, str]) -> None:
        write_json(self.folder / FILE, {"format": _FORMAT, "tasks": digests})
        self._digests = digests


def _read(file: Path) -> dict[str, str]:
    try:
        stored = json.loads(file.read_text())
        if stored["format"] != _FORMAT:
            raise ValueError(f"{file} has the unknown format {stored['format']!r}")
        tasks = dict(stored["tasks"].items())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    for task in tasks:
        if not _NAME.fullmatch(task):  # it names a folder
            raise ValueError(f"{file} is damaged: it has a task {task!r}")
    return tasks
