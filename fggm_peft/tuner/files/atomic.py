"""Writes files and folders as a whole or not at all, reads tensors with metadata, and computes digests of files."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .hub import user_path

PARTIAL = ".partial"
"""How names of unfinished files end."""
TEMPORARY = ".fggm-"
"""How names of temporary folders begin."""


def write_whole(file: Path, text: str) -> None:
    """Write a text file, and its folder if necessary, so that it is never incomplete."""
    with partial_file(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair must not stop a report


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file so that it is never incomplete."""
    write_whole(file, json.dumps(value, indent=1))


def write_tensors(file: Path, tensors: Mapping[str, Tensor], format_name: str, metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file with metadata so that it is never incomplete."""
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with partial_file(file) as partial:
        save_file(tensors, partial, {"format": format_name, "fggm": json.dumps(metadata)})


@contextmanager
def read_tensors(
    file: Path, format_name: str, error_class: type[ValueError]
) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The metadata and the tensors of a file of ``write_tensors``; errors in the context are an ``error_class``."""
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
    """A temporary file next to ``file`` that replaces it when the block ends without an error.

    Processes that write the same file at the same time do not disturb each other; the last one wins.
    """
    file = user_path(file)
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with full_disk_as_oserror(partial):
            yield partial
        partial.replace(file)
    except BaseException:  # for example a full disk
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
    """Raise an ``OSError`` if ``torch.save`` could not write all bytes; its own error tells only positions."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"PytorchStreamWriter|unexpected pos \d+ vs", str(error)):
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full, or a file may not become so large ({str(error).splitlines()[0]})",
            str(path),
        ) from error


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` when the block ends without an error.

    Files of the same name are replaced atomically. Other files in ``folder`` stay. The temporary folder is in
    ``folder``, whose parent may be read-only or in another file system. Without files, or after an error, no new
    folder remains.
    """
    folder = user_path(folder).resolve()
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder, ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
            _move_into(folder, Path(temporary))
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _move_into(folder: Path, temporary: Path) -> None:
    # the config moves last, because PEFT recognizes an adapter by it
    for entry in sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        target = folder / entry.name
        if entry.is_dir():
            target.mkdir(exist_ok=True)
            _move_into(target, entry)
        else:
            entry.replace(target)


def require_writable(folder: Path) -> None:
    """Raise ``OSError`` if no file can be created in a folder, which need not exist."""
    try:
        with complete_folder(folder):
            pass
    except FileExistsError as error:
        raise NotADirectoryError(f"the output {folder} is a file; name a folder") from error
    except (OSError, RuntimeError) as error:  # pathlib raises a RuntimeError for links in a circle
        raise OSError(f"the output {folder} cannot be written: {error}") from error


def file_name(text: str) -> str:
    """A name for a file or folder: the text, or its beginning and a digest if a file system could reject it."""
    content = text.encode()
    if len(content) <= 120:
        return text
    return f"{content[:103].decode(errors='ignore')}-{hashlib.sha256(content).hexdigest()[:16]}"


def digest_of_folder(path: Path, suffixes: Sequence[str] | None = None) -> str:
    """sha256 over names and contents of the files in a folder, or of one file. Hidden files and caches are ignored."""
    if path.is_file():
        return digest_of_files({"": path})
    files = {}
    for file in path.rglob("*"):
        name = file.relative_to(path)
        is_hidden = any(part.startswith(".") for part in name.parts)
        # datasets writes cache files into a folder that it reads
        is_ignored = is_hidden or file.name.startswith("cache-") or (suffixes and file.suffix not in suffixes)
        if file.is_file() and not is_ignored:
            files[name.as_posix()] = file
    return digest_of_files(files)


def digest_of_files(files: Mapping[str, Path]) -> str:
    """sha256 over the keys and the contents of files."""
    total = hashlib.sha256()
    for key, path in sorted(files.items()):
        with path.open("rb") as file:
            total.update(f"{key}\0{sha_fileobj(file).hex()}\n".encode())
    return total.hexdigest()
