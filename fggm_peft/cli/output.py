"""The result of a command, its tables, and checks of the folders that a command reads and writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Args:
        data: for ``--json``; plain types only.
        shown: printed without ``--json``; anything that rich prints.
    """

    data: dict[str, Any]
    shown: Any


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """A table of names and values. Values that are None or empty are omitted."""
    rows = [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
    return table(title, ("", ""), rows, show_header=False)


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], **options: Any) -> Table:
    """A table of texts. The first column is aligned left, the others right."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title) if title else None, **options)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))  # rich would read markup in a str
    return shown


def file_size(path: Path) -> str:
    """The size of a file for people, such as "1.2 MB"."""
    from rich.filesize import decimal

    return decimal(path.stat().st_size)


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise unless ``folder`` may be written. Only the main process checks, since only it writes.

    Raises:
        FileExistsError: the folder is not empty and ``overwrite`` is False.
        NotADirectoryError: it is a file.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # the main process may already be writing
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"the output {folder} is a file; name a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"the output {folder} is not empty; name another folder, or pass --overwrite")


def require_adapter(name: str) -> None:
    """Raise ``FileNotFoundError`` if no adapter has this name, as a folder or on the Hub."""
    from huggingface_hub import hf_hub_download

    from ..tuner.files.hub import from_hub, may_be_hub_id, not_here

    path = Path(name).expanduser()
    if path.exists():
        if not (path / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"no adapter in {name!r}: it has no {ADAPTER_CONFIG}")
    elif "/" not in name or not may_be_hub_id(name):  # an adapter's id contains its owner
        raise FileNotFoundError(f"no adapter in {name!r}: {not_here(name)}")
    else:  # before a base model is loaded
        with from_hub(name, "adapter", FileNotFoundError):
            hf_hub_download(name, ADAPTER_CONFIG)
