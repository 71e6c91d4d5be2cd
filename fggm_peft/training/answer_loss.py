"""A trainer's loss from the logits of the answers alone.

A prompt has no loss, but its logits take memory and time: the head is the widest layer of a small model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..selection.likelihood import IGNORED, takes_positions
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
        if not return_outputs and self.label_smoother is None and self.compute_loss_func is None:
            inputs = answers_only(self.accelerator.unwrap_model(model, keep_torch_compile=False), inputs)
        return super().compute_loss(model, inputs, return_outputs, *args, **kwargs)


def answers_only(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with ``logits_to_keep``, the ``k`` positions that predict answers, and their labels ``[b, k + 1]``.

    The model's own loss compares the logits of a position with the labels of the next, so it does not use the first
    column of labels nor the last of the logits. The batch of a model that would misread positions does not change.
    """
    batch = dict(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or batch.keys() & {"logits_to_keep", "shift_labels"} or not _is_supported(model):
        return batch
    targets = labels[:, 1:]
    positions = (targets != IGNORED).any(0).nonzero()[:, 0]
    if 0 < len(positions) < targets.shape[1]:
        batch["logits_to_keep"] = torch.cat([positions, positions[-1:]])
        batch["labels"] = F.pad(targets[:, positions], (1, 0), value=IGNORED)
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
    )
