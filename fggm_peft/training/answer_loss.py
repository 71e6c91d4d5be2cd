"""A trainer's loss from the logits of the answers alone.

A prompt has no loss, but its logits take memory and time: the head is the widest layer of a small model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..selection.likelihood import IGNORED, has_plain_head, takes_positions
from ..tuner.support import unwrapped

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class AnswerLossMixin(_Trainer):
    """Computes the loss of training steps from the logits of the answers; the loss and its gradients are the same."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        is_plain = self.label_smoother is None and self.compute_loss_func is None
        # DataParallel would divide the positions among its devices
        if is_plain and not return_outputs and not isinstance(model, nn.DataParallel):
            inputs = answers_only(self.accelerator.unwrap_model(model, keep_torch_compile=False), inputs)
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)


def answers_only(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without the labels before the first position that predicts an answer, and with ``logits_to_keep``.

    If the model does not support this, the batch is returned unchanged. A number instead of positions would give the
    model's head a view, whose product in bfloat16 takes 25 times as long on a CPU.
    """
    batch = dict(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or batch.keys() & {"logits_to_keep", "shift_labels"} or not _is_supported(model):
        return batch
    predicting = (labels[:, 1:] != IGNORED).any(0).nonzero()
    if len(predicting) and (first := int(predicting[0])):
        batch["labels"] = labels[:, first:]
        batch["logits_to_keep"] = torch.arange(first, labels.shape[1])
    return batch


def _is_supported(model: nn.Module) -> bool:
    """Whether a model computes transformers' shared loss of causal language models from its text alone."""
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(model, "peft_config", {}).values()):
        return False  # virtual tokens come before the text
    base: Any = unwrapped(model)
    forward = inspect.unwrap(base.forward)
    return (
        forward.__module__.startswith("transformers.models.")  # unsloth's ignores positions
        and "loss_function" in forward.__code__.co_names  # Bart's decoder compares a position with its own label
        and not base.config.sub_configs  # an image or a sound may come before the text
        and takes_positions(model)
        and has_plain_head(model)
    )
