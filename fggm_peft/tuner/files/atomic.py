"""Files and folders that are written whole or not at all, and digests that tell whether they are what they were."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(file: Path, text: str) -> None:
    """Write a file, in folders that are made for it, so that it is never seen half-written."""
    partial = file.with_name(file.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair must not cost a report
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write a file as JSON, whole or not at all."""
    write_whole(file, json.dumps(value, indent=1))


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


def digest_of_folder(path: Path, suffixes: Sequence[str] | None = None) -> str:
    """sha256 over names and contents of a file or of the files in a folder, not counting hidden files and caches."""
    if path.is_file():
        return digest_of_files({"": path})
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return digest_of_files({name: file for name, file in files.items() if _counts(name, file, suffixes)})


def _counts(name: str, file: Path, suffixes: Sequence[str] | None) -> bool:
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    # datasets leaves files of this name in a folder that it only reads
    return not is_hidden and not file.name.startswith("cache-") and (suffixes is None or file.suffix in suffixes)


def digest_of_files(files: Mapping[str, Path]) -> str:
    """sha256 over the keys and the contents of files."""
    whole = hashlib.sha256()
    for key, path in sorted(files.items()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        whole.update(f"{key}\0{content.hexdigest()}\n".encode())
    return whole.hexdigest()
