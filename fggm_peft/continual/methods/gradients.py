"""Trainers that change the gradients between the backward pass and the optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D


class GradientTrainer(Trainer):
    """transformers' ``Trainer``, but the gradients of a step are changed before they are clipped and used.

    It does not support DeepSpeed, which does not keep gradients on the parameters.
    """

    @abstractmethod
    def change_gradients_(self) -> None:
        """Called once per step, after the backward pass of its last batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.change_gradients_()
        return loss


class PenalizedTrainer(GradientTrainer):
    """Adds the gradient of a penalty once per step, for any number of batches in it.

    The logged loss does not contain the penalty, which is logged under its own name.

    Args:
        penalty: returns the terms of the penalty. They are differentiated one by one, so that only the intermediate
            results of one term are in memory.
    """

    def __init__(self, penalty: Callable[[], Iterable[Tensor]], **arguments: Any):
        super().__init__(**arguments)
        self.penalty = penalty
        self.last_penalty: Tensor | float = 0.0

    def change_gradients_(self) -> None:
        self.last_penalty = 0.0
        scaler = self.accelerator.scaler  # for float16, in which the other gradients are scaled
        for term in self.penalty():
            self.last_penalty = self.last_penalty + term.detach()
            (term if scaler is None else scaler.scale(term)).backward()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "penalty": float(self.last_penalty)} if "loss" in logs else logs, *args, **kwargs)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by module path, without the output head, as in PEFT's ``all-linear``."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
