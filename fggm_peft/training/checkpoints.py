"""Finds a trainer's newest complete checkpoint, and reads the selection of a checkpoint before the trainer does."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..selection.select import active_adapter, active_adapters
from ..tuner.config import FGGMConfig
from ..tuner.files.input_covariance import (
    COVARIANCE_FILE,
    InputCovariance,
    load_input_covariance,
    retained_by,
    set_covariance,
    set_retained,
)
from ..tuner.files.saving import as_trained
from ..tuner.files.task_scores import SCORES_FILE, TaskRecord, load_record, remember
from ..tuner.support import unwrapped
from ..tuner.target import find_targets

TASKS_FILE = "fggm_tasks.safetensors"
"""The input covariance of all tasks that were selected on the model."""


def last_complete_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint in a trainer's output folder; raises ``ValueError`` if there is none.

    A process that is killed while it saves leaves an incomplete folder with the highest number. The trainer writes its
    state last, so a readable state shows that a checkpoint is complete.
    """
    checkpoints = {
        int(path.name.rpartition("-")[2]): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            warnings.warn(f"{path} is incomplete and is skipped", stacklevel=3)
        else:
            return path
    raise ValueError(f"No valid checkpoint found in output directory ({folder})")


def unselected_adapters(model: nn.Module) -> list[str]:
    """The active FGGM adapters that have no support yet."""
    names = [name for name, _ in active_adapters(model)]
    return [name for name in names if not any(target.is_selected for target in find_targets(model, name).values())]


def save_retention(model: nn.Module, covariance: InputCovariance, checkpoint: Path) -> None:
    """Save what the adapter retains, and what later tasks should retain, with a checkpoint."""
    covariance.save(checkpoint)
    if (tasks := retained_by(unwrapped(model))) is not None:
        tasks.save(checkpoint / TASKS_FILE)


def recall_selection_(model: nn.Module, checkpoint: Path) -> None:
    """Add a checkpoint's record of its selection to the model's configs, which new code has created.

    The selection also becomes part of the model's history, with its scores if they were saved.
    """
    if (checkpoint / TASKS_FILE).exists():
        set_retained(unwrapped(model), load_input_covariance(checkpoint / TASKS_FILE))
    for name, config in active_adapters(model):
        for folder in (checkpoint / name, checkpoint):
            if config.selection is not None or not (folder / CONFIG_NAME).exists():
                continue
            if (folder / COVARIANCE_FILE).exists():
                set_covariance(config, load_input_covariance(folder))
            config.selection = json.loads((folder / CONFIG_NAME).read_text()).get("selection")
            if config.selection is not None and (folder / SAFETENSORS_WEIGHTS_NAME).exists():
                remember(unwrapped(model), config, _record(config, folder))


def _record(config: FGGMConfig, folder: Path) -> TaskRecord:
    if (folder / SCORES_FILE).exists():
        return load_record(folder)
    samples = (config.selection or {}).get("samples", 0)
    return TaskRecord(config.granularity.to_dict(), samples, config.base_model_name_or_path or "", {})


def load_before_sharding_(model: Any, checkpoint: Path) -> None:
    """Load the support of an adapter that will resume, while its values can still be resized.

    Under FSDP and DeepSpeed the trainer loads a checkpoint after it has sharded the model.
    """
    if not unselected_adapters(model):
        return
    if not (checkpoint / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(
            f"{checkpoint} has no {SAFETENSORS_WEIGHTS_NAME}, so its selection is unknown. FSDP does not write it with "
            "state_dict_type SHARDED_STATE_DICT. Use FULL_STATE_DICT, or select with fggm select and load that adapter."
        )
    with as_trained(model):
        model.load_adapter(str(checkpoint), active_adapter(model, None)[0], is_trainable=True)
