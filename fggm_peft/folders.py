"""Folders that are never left half-written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, whose files move into it when the block ends without an error.

    Files of the same name are replaced, each at once; whatever else is in ``folder`` stays.
    """
    folder = folder.expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        _move_into(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into(folder: Path, temporary: Path) -> None:
    folder.mkdir(exist_ok=True)
    # the config goes last: PEFT takes a folder for an adapter by it
    for entry in sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        if entry.is_dir():
            _move_into(folder / entry.name, entry)
        else:
            entry.replace(folder / entry.name)
