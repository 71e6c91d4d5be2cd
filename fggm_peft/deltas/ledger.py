"""``Ledger``: the tasks of a model in order, in a folder from which any task can be removed again.

The folder contains ``ledger.json`` (names, digests, order), ``deltas/`` (a PEFT adapter for each task) and, after the
tasks were merged into a model, ``originals.safetensors``: the base's entries that the tasks change.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import AdapterFileError
from ..tuner.files.atomic import digest_of_folder, file_name, write_json
from ..tuner.files.hub import user_path
from ..tuner.files.tensors import is_trained_whole
from ..tuner.merging.report import MergeReport
from .apply import apply_deltas, layers_to_change
from .delta import SparseDelta
from .originals import Originals, read_originals, remove_task_, write_originals

FILE = "ledger.json"
DELTAS = "deltas"
ORIGINALS = "originals.safetensors"
_FORMAT = "fggm_ledger 1"


@dataclass(frozen=True)
class LedgerEntry:
    """One task: its name, the folder of its delta (relative to the ledger's), and the digest of this folder."""

    name: str
    folder: str
    digest: str


class Ledger:
    """The tasks of a model, in a folder.

    Args:
        folder: created by the first ``add``.

    Raises:
        ValueError: the ledger in the folder is damaged, or has an unknown format.
    """

    def __init__(self, folder: str | Path):
        self.folder = user_path(folder)
        self.entries: list[LedgerEntry] = []  # in order
        self._next = 0
        if (self.folder / FILE).is_file():
            self._read(self.folder / FILE)

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, tasks={self.tasks})"

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in order."""
        return [entry.name for entry in self.entries]

    def delta(self, name: str) -> SparseDelta:
        """The delta of a task; raises ``AdapterFileError`` if its files have changed since it was added."""
        entry = self._entry(name)
        folder = self.folder / entry.folder
        if not folder.is_dir() or digest_of_folder(folder) != entry.digest:
            raise AdapterFileError(
                f"the delta of {name!r} in {folder} has changed since it was added: files are missing or differ"
            )
        return SparseDelta.read(folder)

    def add(self, name: str, delta: Any) -> None:
        """Append a task; its delta is copied into the folder.

        Args:
            name: letters, digits, ``-``, ``_`` and ``.``.
            delta: what ``SparseDelta.read`` accepts.

        Raises:
            ValueError: the name is taken or illegal, or the delta has whole tensors, which cannot be removed again.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"the name of a task may contain letters, digits, '-', '_' and '.', not {name!r}")
        if name in self.tasks:
            raise ValueError(f"{self.folder} has a task {name!r} already; roll it back first, or use another name")
        source = SparseDelta.read(delta)
        if whole := [key for key in source.others if is_trained_whole(key)]:
            raise ValueError(
                f"the delta of {name!r} has whole tensors ({whole[0]}, ...). They are not differences and could not be "
                "removed again"
            )
        folder = f"{DELTAS}/{self._next}-{file_name(name)}"
        shutil.rmtree(self.folder / folder, ignore_errors=True)  # of an interrupted attempt
        SparseDelta(source.config, source.modules).save(self.folder / folder)
        entry = LedgerEntry(name, folder, digest_of_folder(self.folder / folder))
        self._write([*self.entries, entry], self._next + 1)

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
        deltas = [self.delta(name) for name in self.tasks]
        if not deltas:
            raise ValueError(f"there is no task in {self.folder} to apply")
        layers, file = layers_to_change(model, deltas), self.folder / ORIGINALS
        if not all(saved.are_in(layers[path]) for path, saved in read_originals(file).items() if path in layers):
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
        self._entry(task)
        deltas = {name: self.delta(name) for name in self.tasks}
        layers = layers_to_change(model, list(deltas.values()))
        remove_task_(model, layers, deltas, task, read_originals(self.folder / ORIGINALS))
        if remove:
            self.remove(task)

    def remove(self, task: str) -> None:
        """Remove a task and its delta from the ledger only."""
        entry = self._entry(task)
        self._write([other for other in self.entries if other is not entry], self._next)
        shutil.rmtree(self.folder / entry.folder, ignore_errors=True)

    def _entry(self, name: str) -> LedgerEntry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise ValueError(f"there is no task {name!r} in {self.folder}; its tasks: {', '.join(self.tasks) or 'none'}")

    def _read(self, file: Path) -> None:
        try:
            stored = json.loads(file.read_text())
            if stored["format"] != _FORMAT:
                raise ValueError(f"{file} has the unknown format {stored['format']!r}")
            self.entries = [LedgerEntry(**entry) for entry in stored["tasks"]]
            self._next = int(stored["next"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error
        for entry in self.entries:
            if not re.fullmatch(rf"{DELTAS}/\d+-\w[\w.-]*", entry.folder):
                raise ValueError(f"{file} is damaged: the folder of {entry.name!r} is {entry.folder!r}")

    def _write(self, entries: list[LedgerEntry], following: int) -> None:
        stored = {"format": _FORMAT, "next": following, "tasks": [asdict(entry) for entry in entries]}
        write_json(self.folder / FILE, stored)
        self.entries, self._next = entries, following
