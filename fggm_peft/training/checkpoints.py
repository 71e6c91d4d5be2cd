"""Which of a trainer's checkpoints were written to their end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a trainer's output folder that is whole.

    A process that is killed while it writes leaves a folder behind with the highest number and a part of
    its files. The trainer writes its state last, so a readable state tells that all else is there.

    Raises:
        ValueError: there is none; names the folder.
    """
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    for _, path in sorted(numbered, reverse=True):
        if _is_complete(path):
            return path
        warnings.warn(f"{path} was not written to its end and is passed by", stacklevel=3)
    raise ValueError(f"No valid checkpoint found in output directory ({folder})")


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True
