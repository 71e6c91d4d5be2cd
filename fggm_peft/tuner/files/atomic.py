"""Writes files and folders as a whole or not at all, reads tensors with metadata, and computes digests of files."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_whole(file: Path, text: str) -> None:
    """Write a text file, and its folder if necessary, so that it is never incomplete."""
    with partial_file(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair must not stop a report


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file so that it is never incomplete."""
    write_whole(file, json.dumps(value, indent=1))


def write_tensors(file: Path, tensors: Mapping[str, Tensor], format_name: str, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with metadata so that it is never incomplete."""
    header = {"format": format_name, "fggm": json.dumps(metadata)}
    with partial_file(file) as partial:
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, partial, header)


@contextmanager
def read_tensors(
    file: Path, format_name: str, error_class: type[ValueError]
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The metadata and the tensors of a file that ``write_tensors`` wrote.

    Raises:
        error_class: the file is damaged or of another format, or the context finds that its contents are damaged.
    """
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != format_name:
                raise error_class(f"{file} is not of the format {format_name!r}, but of {header.get('format')!r}")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        yield json.loads(header["fggm"]), tensors
    except error_class:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise error_class(f"{file} is damaged: {error!r}") from error


@contextmanager
def partial_file(file: Path) -> Iterator[Path]:
    """A temporary file next to ``file`` that replaces it when the block ends without an error."""
    partial = file.with_name(file.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except OSError:  # for example a full disk
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error.

    Files of the same name are replaced one by one, each atomically. Other files in ``folder`` stay.
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
    # the config moves last, because PEFT recognizes an adapter by it
    for entry in sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        if entry.is_dir():
            _move_into(folder / entry.name, entry)
        else:
            entry.replace(folder / entry.name)


def digest_of_folder(path: Path, suffixes: Sequence[str] | None = None) -> str:
    """sha256 over names and contents of the files in a folder, or of one file. Hidden files and caches are ignored."""
    if path.is_file():
        return digest_of_files({"": path})
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return digest_of_files({name: file for name, file in files.items() if _counts(name, file, suffixes)})


def _counts(name: str, file: Path, suffixes: Sequence[str] | None) -> bool:
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    # datasets writes cache files into a folder that it reads
    return not is_hidden and not file.name.startswith("cache-") and (suffixes is None or file.suffix in suffixes)


def digest_of_files(files: Mapping[str, Path]) -> str:
    """sha256 over the keys and the contents of files."""
    total = hashlib.sha256()
    for key, path in sorted(files.items()):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        total.update(f"{key}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()
