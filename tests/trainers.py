"""Trainers on small data, and helpers to compare their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import VOCABULARY, fggm_layers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fggm_peft.training import FGGMTrainer, FGGMTrainerMixin


class MixinTrainer(FGGMTrainerMixin, Trainer):
    """The mixin in a trainer with transformers' loss."""


def examples(count: int = 24, length: int = 10, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of equal length; the first third is the prompt."""
    rows = torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    masked = [-100] * (length // 3)
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": masked + row[len(masked) :]} for row in rows]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Arguments for four steps on the CPU that log every loss and save nothing."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **settings})


def make_trainer(model: nn.Module | None, folder: Path, trainer_class: type = FGGMTrainer, **settings: Any) -> Trainer:
    """A trainer on ``examples()``; settings are arguments of ``Trainer`` or of ``TrainingArguments``."""
    own = ("train_dataset", "eval_dataset", "callbacks", "optimizers", "model_init", "data_collator")
    options = {"train_dataset": examples(), **{name: settings.pop(name) for name in own if name in settings}}
    return trainer_class(model=model, args=arguments(folder, **settings), **options)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluation_losses(trainer: Trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def delta(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all values and indices of the adapter ``default``."""
    layers = fggm_layers(model, "default").items()
    values = {f"{name}.values": layer.fggm_values["default"].detach().clone() for name, layer in layers}
    return values | {f"{name}.indices": layer.fggm_indices["default"].clone() for name, layer in layers}


def assert_same_delta(a: nn.Module | dict, b: nn.Module | dict, **tolerance: float) -> None:
    """Check that supports are equal, and values too: bit-exactly if no tolerance is given."""
    a, b = (one if isinstance(one, dict) else delta(one) for one in (a, b))
    assert a.keys() == b.keys() and any(len(tensor) for tensor in a.values())
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=name: n + m
        )
