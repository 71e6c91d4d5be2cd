"""Tables, and checks of the folders and adapters that a command reads and writes."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.base_model import BaseModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

Result = tuple[dict[str, Any], Any]
"""The result of a command: plain types for ``--json``, and something that rich prints without it."""


def facts_table(title: str, facts: Mapping[str, Any]) -> Table:
    """A table of names and values. Empty values, and values that are dicts, are omitted."""
    texts = {name.replace("_", " "): _text(name, value) for name, value in facts.items()}
    return table(title, ("", ""), [(name, text) for name, text in texts.items() if text], show_header=False)


def _text(name: str, value: Any) -> str:
    from rich.filesize import decimal

    if value is None or isinstance(value, dict):
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if name in ("density", "accuracy"):
        return f"{value:.2%}"
    if name == "bytes" or name.endswith("_bytes"):
        return decimal(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


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


def add_output(parser: ArgumentParser, help: str = "Folder for the result.", required: bool = True) -> None:
    parser.add_argument("--output", "-o", type=Path, required=required, help=help)
    parser.add_argument("--overwrite", action="store_true", help="Replace the files in the output folder.")


def require_free(folder: Path, overwrite: bool, remedy: str = ", or pass --overwrite") -> None:
    """Raise unless ``folder`` can and may be written. Only the main process checks, since only it writes."""
    from ..tuner.files.atomic import TEMPORARY, require_writable

    if os.environ.get("RANK", "0") != "0":
        return  # the main process may already be writing
    require_writable(folder)
    is_free = not folder.is_dir() or all(path.name.startswith(TEMPORARY) for path in folder.iterdir())
    if not overwrite and not is_free:
        raise FileExistsError(f"the folder {folder} is not empty; name another one{remedy}")


def save_model(base: BaseModel, model: Any, folder: Path) -> None:
    """Save a whole model with the tokenizer of its base, if that has one."""
    from ..training.base_model import BaseModelError

    model.save_pretrained(folder)
    with suppress(BaseModelError):
        base.load_tokenizer(as_saved=True).save_pretrained(folder)


def add_adapter(parser: ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder or Hub id of an FGGM adapter.")


def require_adapter(name: str) -> None:
    """Raise ``FileNotFoundError`` if no adapter has this name, as a folder or on the Hub."""
    from huggingface_hub import hf_hub_download

    from ..tuner.files.hub import from_hub, may_be_hub_id, not_here, user_path

    path = user_path(name)
    if path.exists():
        if not (path / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"no adapter in {name!r}: it has no {ADAPTER_CONFIG}")
    elif "/" not in name or not may_be_hub_id(name):  # an adapter's id contains its owner
        raise FileNotFoundError(f"no adapter in {name!r}: {not_here(name)}")
    else:  # before a base model is loaded
        with from_hub(name, "adapter", FileNotFoundError):
            hf_hub_download(name, ADAPTER_CONFIG)
