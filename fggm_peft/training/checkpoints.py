"""Finds a trainer's newest complete checkpoint, and reads the selection of a checkpoint before the trainer does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..selection.select import active_adapters
from ..tuner.config import FGGMConfig
from ..tuner.files.input_covariance import (
    COVARIANCE_FILE,
    InputCovariance,
    load_input_covariance,
    retain,
    retained_by,
    set_covariance,
    set_retained,
    task_of,
)
from ..tuner.files.task_scores import SCORES_FILE, TaskRecord, load_record, remember
from ..tuner.support import unwrapped
from ..tuner.target import find_targets

TASKS_FILE, TASK_FILE = "fggm_tasks.safetensors", "fggm_task.safetensors"
"""The input covariances of the tasks before this one, and of this one."""


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


def adapter_folder(model: nn.Module, checkpoint: Path, adapter_name: str) -> Path:
    """The folder in which a checkpoint contains an adapter. PEFT saves every adapter but "default" in a subfolder."""
    return checkpoint / adapter_name if isinstance(model, PeftModel) and adapter_name != "default" else checkpoint


def load_adapters_(model: nn.Module, checkpoint: Path, names: Iterable[str]) -> None:
    """Load the values and supports of adapters from a checkpoint; the training modes of the model do not change."""
    for name in names:
        weights = load_peft_weights(str(adapter_folder(model, checkpoint, name)), device="cpu")
        set_peft_model_state_dict(model, weights, adapter_name=name)


def unselected_adapters(model: nn.Module) -> list[str]:
    """The active FGGM adapters that have no support yet."""
    names = [name for name, _ in active_adapters(model)]
    return [name for name in names if not any(target.is_selected for target in find_targets(model, name).values())]


def save_retention(model: nn.Module, covariance: InputCovariance, checkpoint: Path) -> None:
    """Save what the adapter retains, and what later tasks should retain, with a checkpoint."""
    covariance.save(checkpoint)
    base = unwrapped(model)
    owner = next((config for _, config in active_adapters(model) if task_of(base, config)), None)
    for name, part in ((TASKS_FILE, retained_by(base, besides=owner)), (TASK_FILE, task_of(base, owner))):
        if part is not None:
            part.save(checkpoint / name)


def recall_selection_(model: nn.Module, checkpoint: Path) -> None:
    """Copy the selection recorded in a checkpoint into the configs of a newly created model.

    The selection also becomes part of the model's history, with its scores if they were saved.
    """
    base = unwrapped(model)
    if (checkpoint / TASKS_FILE).exists():
        set_retained(base, load_input_covariance(checkpoint / TASKS_FILE))
    if (checkpoint / TASK_FILE).exists():
        owner = next(config for _, config in active_adapters(model) if config.needs_covariance)
        retain(base, load_input_covariance(checkpoint / TASK_FILE), owner)
    file = checkpoint / COVARIANCE_FILE
    covariance = load_input_covariance(file) if file.exists() else None
    for name, config in active_adapters(model):
        folder = adapter_folder(model, checkpoint, name)
        if config.selection is not None or not (folder / CONFIG_NAME).exists():
            continue
        if covariance is not None:
            set_covariance(config, covariance)
        config.selection = json.loads((folder / CONFIG_NAME).read_text()).get("selection")
        if config.selection is not None and (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            remember(unwrapped(model), config, _record(config, folder))


def _record(config: FGGMConfig, folder: Path) -> TaskRecord:
    if (folder / SCORES_FILE).exists():
        return load_record(folder)
    samples = (config.selection or {}).get("samples", 0)
    return TaskRecord(config.granularity.to_dict(), samples, config.base_model_name_or_path or "", {})


def load_before_sharding_(model: nn.Module, checkpoint: Path) -> None:
    """Load the support of an adapter that will resume, while its values can still be resized.

    Under FSDP and DeepSpeed the trainer loads a checkpoint after it has sharded the model.
    """
    for name in unselected_adapters(model):
        file = adapter_folder(model, checkpoint, name) / SAFETENSORS_WEIGHTS_NAME
        if not file.exists():
            raise ValueError(
                f"{file} does not exist, so the selection is unknown. FSDP does not write it with state_dict_type "
                "SHARDED_STATE_DICT. Use FULL_STATE_DICT, or select with fggm select and load that adapter."
            )
        load_adapters_(model, checkpoint, [name])
