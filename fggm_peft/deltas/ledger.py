"""``Ledger``: the tasks that a model has learned, in order, in a folder from which any of them can be taken out again.

The folder holds ``ledger.json`` (names, digests, order), ``deltas/`` (a PEFT adapter for each task) and, once the tasks
were merged into a model, ``originals.safetensors``: what the base had where any of them has changed it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import AdapterFileError
from ..tuner.files.atomic import digest_of_folder, write_json
from ..tuner.files.tensors import BASE_PART
from ..tuner.merging.report import MergeReport
from .apply import apply_deltas, plain_layers
from .delta import SparseDelta
from .meta_base import Base
from .overlaps import shared_entries
from .touched_entries import Originals, put_back

FILE = "ledger.json"
DELTAS = "deltas"
ORIGINALS = "originals.safetensors"
_FORMAT = "fggm_ledger 1"


@dataclass(frozen=True)
class Entry:
    """One task of a ledger.

    Args:
        name: of the task.
        folder: of its delta, within the ledger's.
        digest: sha256 over the files of the delta.
        granularity, parameters, density: of the delta.
    """

    name: str
    folder: str
    digest: str
    granularity: str
    parameters: int
    density: float


@dataclass(frozen=True)
class RollbackReport:
    """How a task was taken out.

    Args:
        task: its name.
        restored_from: "originals" or "base" (the entries as they were, and what other tasks changed there added
            again), "sidecar" (of a quantized base), "subtraction" (the delta was subtracted and rounded), or
            "nothing" where no model was given.
        is_exact: the model is, bit for bit, what it would be without the task.
        entries: of the weights that the task had changed.
        overlaps: other task -> how many of these entries it has changed too.
    """

    task: str
    restored_from: str
    is_exact: bool
    entries: int
    overlaps: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        shared = ", ".join(f"{count:,} with {name}" for name, count in self.overlaps.items() if count)
        how = {True: "exactly", False: "up to rounding"}[self.is_exact]
        return (
            f"{self.task} taken out {how} ({self.restored_from}): {self.entries:,} entries, "
            f"{shared or 'none'} shared with other tasks"
        )


class Ledger:
    """The tasks of a model, in a folder.

    Args:
        folder: is made by the first ``add``.

    Raises:
        ValueError: the folder holds another kind of ledger, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._entries: list[Entry] = []
        self._next = 0
        if (self.folder / FILE).is_file():
            self._read()

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in their order."""
        return [entry.name for entry in self._entries]

    @property
    def entries(self) -> list[Entry]:
        """The tasks with what is written of each, in their order."""
        return list(self._entries)

    def delta(self, name: str) -> SparseDelta:
        """The delta of a task.

        Raises:
            ValueError: there is no such task.
            AdapterFileError: its files are not what they were when it was added.
        """
        entry = self._entry(name)
        folder = self.folder / entry.folder
        if not folder.is_dir() or digest_of_folder(folder) != entry.digest:
            raise AdapterFileError(
                f"the delta of {name!r} in {folder} is not what was added: files are missing or have changed"
            )
        return SparseDelta.read(folder)

    def add(self, name: str, delta: Any, base: Base | None = None) -> Entry:
        """Put a task at the end; its delta is copied into the folder.

        Args:
            name: letters, digits, ``-``, ``_`` and ``.``.
            delta: what ``SparseDelta.read`` takes.
            base: see ``SparseDelta.read``.

        Raises:
            ValueError: the name is taken or no such name, or the delta comes with whole tensors, which cannot be
                taken out again.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"a task's name has letters, digits, '-', '_' and '.', not {name!r}")
        if name in self.tasks:
            raise ValueError(f"there is a task {name!r} in {self.folder} already; roll it back first, or name another")
        found = SparseDelta.read(delta, base)
        whole = [key for key in found.others if BASE_PART not in key]
        if whole:
            raise ValueError(
                f"the delta of {name!r} has whole tensors ({whole[0]}, ...), which are no differences and could not be "
                "taken out again"
            )
        found = SparseDelta(found.config, found.modules)
        folder = f"{DELTAS}/{self._next}-{name}"
        shutil.rmtree(self.folder / folder, ignore_errors=True)  # of an attempt that was interrupted
        found.save(self.folder / folder)
        digest = digest_of_folder(self.folder / folder)
        entry = Entry(name, folder, digest, str(found.config.granularity), found.parameters, found.density)
        self._write([*self._entries, entry], self._next + 1)
        return entry

    def apply(
        self, model: nn.Module, up_to: str | None = None, keep_originals: bool = True, progress: bool = False
    ) -> MergeReport:
        """Merge the tasks into a base model, in place and in order.

        Args:
            model: the base, without adapters. Its quantized layers get the deltas beside them.
            up_to: the last task; by default all are merged.
            keep_originals: write what the base has where a task changes it into the folder, so that tasks can be
                rolled back exactly out of the merged model, also in another process and without the base.
            progress: show a bar.

        Raises:
            ValueError: a delta does not fit the model, or originals were kept of another base: then the model is not
                the base, or is merged already.
            AdapterFileError: a delta is not what was added.
        """
        deltas = self._deltas(up_to)
        if not deltas:
            raise ValueError(f"there is no task in {self.folder} to apply")
        layers = plain_layers(model, deltas)
        if keep_originals:
            earlier = self._originals()
            if earlier is not None and not earlier.are_in(layers):
                raise ValueError(
                    f"{self.folder / ORIGINALS} was kept of another base: pass the base model itself, with nothing "
                    "merged into it, or keep_originals=False"
                )
            originals = Originals.of(layers, deltas)
            self.folder.mkdir(parents=True, exist_ok=True)
            originals.save(self.folder / ORIGINALS)
        return apply_deltas(model, deltas, progress)

    def rollback(
        self, task: str, model: nn.Module | None = None, base: Base | None = None, up_to: str | None = None
    ) -> RollbackReport:
        """Take a task out: of a merged model, if one is given, and of the ledger.

        Args:
            task: any, not only the last.
            model: what ``apply`` has merged the tasks into; changed in place.
            base: the base model, or a checkpoint of it, if ``apply`` has kept no originals.
            up_to: the last task that is in the model; by default all are.

        Returns:
            How it was done, and what other tasks have changed too. Without originals and without the base the delta
            is subtracted, which leaves rounding: ``is_exact`` is False.

        Raises:
            ValueError: there is no such task, or the model is not what merging these tasks gives. Nothing has been
                changed then.
        """
        report = self.take_out(task, model, base, up_to)
        self.remove(task)
        return report

    def take_out(
        self, task: str, model: nn.Module | None = None, base: Base | None = None, up_to: str | None = None
    ) -> RollbackReport:
        """``rollback`` of the model alone; the ledger stays as it is."""
        target = self.delta(task)
        names = self.tasks[: self._position(up_to)]
        if task not in names:
            raise ValueError(f"{task!r} comes after {up_to!r}, so that it is not in the model")
        deltas = {name: target if name == task else self.delta(name) for name in names}
        how = "nothing"
        if model is not None:
            layers = plain_layers(model, list(deltas.values()))
            originals = self._originals() if base is None else Originals.from_base(layers, list(deltas.values()), base)
            how = put_back(model, layers, deltas, task, originals)
            how = "base" if how == "originals" and base is not None else how
        entries = sum(module.values.numel() for module in target.modules.values())
        shared = {name: shared_entries(target, delta) for name, delta in deltas.items() if name != task}
        return RollbackReport(task, how, how != "subtraction", entries, shared)

    def remove(self, task: str) -> None:
        """Take a task out of the ledger alone, with its delta."""
        entry = self._entry(task)
        self._write([other for other in self._entries if other is not entry], self._next)
        shutil.rmtree(self.folder / entry.folder, ignore_errors=True)

    def reorder(self, names: Sequence[str]) -> None:
        """Give the tasks another order. It matters only for how entries that several have changed are rounded.

        Raises:
            ValueError: the names are not those of the tasks, each once.
        """
        if sorted(names) != sorted(self.tasks):
            raise ValueError(f"the tasks are {', '.join(self.tasks)}, each once; got {', '.join(names)}")
        self._write([self._entry(name) for name in names], self._next)

    def verify(self) -> None:
        """Check that every delta is whole and what it was when it was added.

        Raises:
            AdapterFileError: says what is wrong with which of them.
        """
        problems = []
        for name in self.tasks:
            try:
                self.delta(name)
            except (AdapterFileError, ValueError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise AdapterFileError("; ".join(problems))

    # ---------------------------------------------------------------------------------------------

    def _deltas(self, up_to: str | None) -> list[SparseDelta]:
        return [self.delta(name) for name in self.tasks[: self._position(up_to)]]

    def _position(self, up_to: str | None) -> int:
        return len(self._entries) if up_to is None else self.tasks.index(self._entry(up_to).name) + 1

    def _entry(self, name: str) -> Entry:
        found = next((entry for entry in self._entries if entry.name == name), None)
        if found is None:
            there = ", ".join(self.tasks) or "none"
            raise ValueError(f"there is no task {name!r} in the ledger {self.folder}; its tasks: {there}")
        return found

    def _originals(self) -> Originals | None:
        file = self.folder / ORIGINALS
        return Originals.load(file) if file.is_file() else None

    def _read(self) -> None:
        file = self.folder / FILE
        try:
            written = json.loads(file.read_text())
            if isinstance(written, list):
                raise ValueError(
                    f"{file} is that of a sequence of tasks (fggm sequence), not of deltas: add its tasks/* to a "
                    "Ledger in another folder"
                )
            if written["format"] != _FORMAT:
                raise ValueError(f"{file} has the format {written['format']!r}, which this version does not know")
            self._entries = [Entry(**entry) for entry in written["tasks"]]
            self._next = int(written["next"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error
        for entry in self._entries:
            if not re.fullmatch(rf"{DELTAS}/\d+-\w[\w.-]*", entry.folder):
                raise ValueError(f"{file} is damaged: the folder of {entry.name!r} is {entry.folder!r}")

    def _write(self, entries: list[Entry], following: int) -> None:
        written = {"format": _FORMAT, "next": following, "tasks": [asdict(entry) for entry in entries]}
        write_json(self.folder / FILE, written)
        self._entries, self._next = entries, following
