"""``fggm card``: writes the model card of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import Result, require_adapter


def run(adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an FGGM adapter.")]) -> Result:
    """Write the model card of ADAPTER (README.md), or update the library's part of it.

    The author's text is kept.
    """
    if not adapter.is_dir():
        raise FileNotFoundError(f"no folder {str(adapter)!r}; a card is written into an adapter's folder")
    require_adapter(str(adapter))

    from ..tuner.files.model_card import write_card
    from ..tuner.files.reading import read_config

    path = write_card(adapter, read_config(adapter / "adapter_config.json"))
    return Result({"card": str(path)}, f"Written: {path}. Add the license to its header.")
