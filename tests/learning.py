"""Methods that learn the tasks of a sequence, as the runner calls them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from trainers import arguments, examples
from transformers import Trainer

from fggm_peft.continual.methods import Method


def begin(method: Method, model: nn.Module, number: int, data) -> nn.Module:
    method.number = number
    return method.begin_task(model, data)


def learn(
    method: Method, model: nn.Module, number: int, folder: Path, callbacks=(), data=None, **settings
) -> tuple[nn.Module, Trainer | None]:
    """Train one task as the runner does."""
    data = data or examples(seed=number)
    model = begin(method, model, number, data)
    trainer = None
    if method.trains:
        args = arguments(folder / "trainer", **{"lr_scheduler_type": "linear", **settings})
        trainer = method.trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return method.end_task(model, trainer, folder / str(number)), trainer


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Recorder:
    """The batches of a training run, as the collator made them."""

    def __init__(self, model: nn.Module):
        self.batches: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model, args, kwargs):
        batch = {key: kwargs[key].clone() for key in ("input_ids", "attention_mask", "labels")}
        prompt = batch["input_ids"].shape[1] - batch["labels"].shape[1]  # has no labels if logits_to_keep is set
        batch["labels"] = nn.functional.pad(batch["labels"], (prompt, 0), value=-100)
        self.batches += [batch] if model.training else []
