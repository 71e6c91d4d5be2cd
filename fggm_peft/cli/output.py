"""The folders that a command reads and writes: refused if nothing is there, or if it would overwrite what is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tuner.config import FGGMConfig

CHECKPOINTS = "checkpoints"
MERGED = "merged"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise unless ``folder`` may be written. Of several processes, the main one looks: it is the one that writes.

    Raises:
        FileExistsError: it exists, is not empty, and ``overwrite`` is False.
        NotADirectoryError: it is a file.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the main process may have begun to write by now
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output {folder} is a file; name a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"the output {folder} is not empty; name another folder, or pass --overwrite")


def require_checkpoint(folder: Path) -> None:
    """Raise ``FileNotFoundError`` if there is nothing in ``folder`` that training could be resumed from."""
    if not any((folder / CHECKPOINTS).glob("checkpoint-*")):
        raise FileNotFoundError(f"nothing to resume: no checkpoint in {folder / CHECKPOINTS}; leave --resume out")


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Remove what a trainer made for checkpoints, if an error came before the first of them."""
    try:
        yield
    finally:
        for path in (folder / CHECKPOINTS, folder):
            with suppress(OSError):  # it is not empty, or another process has removed it
                path.rmdir()


def require_adapter(folder: str) -> None:
    """Raise ``FileNotFoundError`` if there is no adapter under this name, neither here nor on the Hub."""
    from huggingface_hub import hf_hub_download

    from ..tuner.files.hub import from_hub, may_be_hub_id, not_here

    path = Path(folder).expanduser()
    if path.exists():
        if not (path / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"no adapter in {folder!r}: it has no {ADAPTER_CONFIG}")
    elif "/" not in folder or not may_be_hub_id(folder):  # an adapter's id has an owner
        raise FileNotFoundError(f"no adapter in {folder!r}: {not_here(folder)}")
    else:  # asked now, and not after a base has been loaded and evaluated
        with from_hub(folder, "adapter", FileNotFoundError):
            hf_hub_download(folder, ADAPTER_CONFIG)


def require_protected(config: FGGMConfig) -> None:
    """The same of the earlier deltas that a selection is to keep out of."""
    for name in config.protect or []:
        if name != "history":
            require_adapter(name)
