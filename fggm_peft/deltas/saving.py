"""Saves an adapter so that a folder holds the old one or the new one, whatever happens on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..tuner.files.atomic import complete_folder


def save_adapter(model: Any, folder: str | Path, is_main_process: bool = True, **options: Any) -> None:
    """``model.save_pretrained(folder)``, written beside the folder and moved into it when it is whole.

    PEFT writes each file in its place, so a process that is killed meanwhile leaves a part of one. The model card that
    is in the folder is kept, as by PEFT.

    Args:
        model: a ``PeftModel``.
        is_main_process: whether this process writes; the others only help to gather what is sharded.
        options: of ``PeftModel.save_pretrained``.
    """
    if not is_main_process:
        model.save_pretrained(str(folder), is_main_process=False, **options)
        return
    with complete_folder(Path(folder)) as temporary:
        keep_card(Path(folder), temporary)
        model.save_pretrained(str(temporary), **options)


def keep_card(folder: Path, temporary: Path) -> None:
    """Let what is written in ``temporary`` start from the model card that is in ``folder``."""
    if (folder / "README.md").is_file():
        shutil.copy(folder / "README.md", temporary / "README.md")
