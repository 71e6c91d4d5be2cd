"""``fggm card``: write the model card of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import Result
from .output import require_adapter


def run(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
) -> Result:
    """Write the model card of ADAPTER (README.md), or the library's part of it anew.

    What its author has written is kept. A card of an older version gets the part under "How to Get Started".
    """
    if not adapter.is_dir():
        raise FileNotFoundError(f"no folder {str(adapter)!r}; a card is written into an adapter's own")
    require_adapter(str(adapter))

    from ..tuner.files.model_card import write_card
    from ..tuner.files.reading import read_config

    path = write_card(adapter, read_config(adapter / "adapter_config.json"))
    return Result({"card": str(path)}, f"Written: {path}. Put its license into the header.")
