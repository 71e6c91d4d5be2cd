"""Which of a trainer's checkpoints are whole, and what has to be read of one before the trainer does."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..selection.protection import supports_in_file
from ..selection.select import active_adapter, active_adapters
from ..tuner.config import FGGMConfig
from ..tuner.files.saving import as_trained
from ..tuner.files.task_scores import SCORES_FILE, TaskRecord, load_record, remember
from ..tuner.support import fggm_layers, unwrapped


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


def unselected_adapters(model: nn.Module) -> list[str]:
    """The active FGGM adapters that have no support yet.

    Raises:
        ValueError: the model has no active FGGM adapter.
    """
    return [
        name
        for name, _ in active_adapters(model)
        if not any(layer.selected[name] for layer in fggm_layers(model, name).values())
    ]


def recall_selection_(model: nn.Module, checkpoint: Path) -> None:
    """Put what a checkpoint says of its selection on the model's configs, which come from new code.

    The model's history gets what was selected, too, with the scores if they were saved.
    """
    for name, config in active_adapters(model):
        for folder in (checkpoint / name, checkpoint):
            if config.selection is not None or not (folder / CONFIG_NAME).exists():
                continue
            config.selection = json.loads((folder / CONFIG_NAME).read_text()).get("selection")
            if config.selection is not None and (folder / SAFETENSORS_WEIGHTS_NAME).exists():
                remember(unwrapped(model), config, _record(model, config, folder))


def _record(model: nn.Module, config: FGGMConfig, folder: Path) -> TaskRecord:
    supports = {module: indices for module, (_, indices) in supports_in_file(model, str(folder))}
    if (folder / SCORES_FILE).exists():
        return replace(load_record(folder), supports=supports)
    samples = (config.selection or {}).get("samples", 0)
    return TaskRecord(config.granularity.to_dict(), samples, config.base_model_name_or_path or "", {}, supports)


def load_before_sharding_(model: Any, checkpoint: Path) -> None:
    """Give an adapter that is about to resume its support while its values can still take their size.

    Under FSDP and DeepSpeed the trainer loads a checkpoint after the model is sharded.

    Raises:
        ValueError: the checkpoint holds no adapter file.
    """
    if not unselected_adapters(model):
        return
    if not (checkpoint / SAFETENSORS_WEIGHTS_NAME).exists():
        raise ValueError(
            f"{checkpoint} holds no {SAFETENSORS_WEIGHTS_NAME}, which tells what was selected: FSDP writes none with "
            "state_dict_type SHARDED_STATE_DICT. Use FULL_STATE_DICT, or select before training (fggm select) and load "
            "that adapter."
        )
    with as_trained(model):
        model.load_adapter(str(checkpoint), active_adapter(model, None)[0], is_trainable=True)
