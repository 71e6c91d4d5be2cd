"""What a method with harm decay retains while it learns a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from ...selection import input_covariance
from ...selection.input_covariance import COVARIANCE_SAMPLES, input_widths
from ...selection.reference import WRITTEN_LENGTH, WRITTEN_TEXTS, covariance_to_retain
from ...selection.self_text import written_batches
from ...training.texts import with_texts
from ...tuner import InputCovariance

if TYPE_CHECKING:
    from .method import Method

RETAINED = "retained"
"""Key of the sum of the earlier tasks' input covariances in a method's memory."""


def covariance_for_task(method: Method, trainer: Trainer) -> InputCovariance:
    """The input covariance of the method's reference, on the model before the task.

    If the reference contains "history", the task is added to the method's memory for later tasks.
    """
    model: Any = trainer.model
    saved = method.memory.get(RETAINED)
    history = None if saved is None else InputCovariance.from_dict(saved)
    with trainer.accelerator.autocast():
        covariance = covariance_to_retain(model, _entries(method, trainer), input_widths(model), history)
        if "history" in method.reference:
            own = task_covariance(method, trainer)
            method.memory[RETAINED] = (own if history is None else history + own).to_dict()
    return covariance


def task_covariance(method: Method, trainer: Trainer) -> InputCovariance:
    """The input covariance of the task's data, on the CPU."""
    data: Any = trainer.train_dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(method.task_seed))[:COVARIANCE_SAMPLES]
    own = Subset(data, order[trainer.accelerator.process_index :: trainer.accelerator.num_processes].tolist())
    model: Any = trainer.model
    return input_covariance(model, DataLoader(own, batch_size=8, collate_fn=trainer.data_collator)).to("cpu")


def _entries(method: Method, trainer: Trainer) -> list[Any]:
    """The reference with data instead of text files and of "self"."""
    tokenizer: Any = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    model: Any = trainer.model
    written = (
        written_batches(model, WRITTEN_TEXTS, WRITTEN_LENGTH, method.task_seed) if "self" in method.reference else None
    )
    return [written if isinstance(e, str) and e == "self" else e for e in with_texts(method.reference, tokenizer)]
