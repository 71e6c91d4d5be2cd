"""Trainers that have a word to say between the backward pass and the optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D


class GradientTrainer(Trainer):
    """transformers' ``Trainer``, with the gradients of a step changed before they are clipped and used.

    Not for DeepSpeed, where gradients are not found on the parameters.
    """

    @abstractmethod
    def change_gradients_(self) -> None:
        """Called once a step, when the gradients of its last batch have been added up."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.change_gradients_()
        return loss


class PenalizedTrainer(GradientTrainer):
    """Adds the gradient of a penalty once a step, whatever the number of batches in it.

    The logged loss is the task's alone; the penalty is logged under its own name.

    Args:
        penalty: gives the terms whose sum is the penalty. They are differentiated one by one, so that the
            intermediate results of only one of them are in memory.
    """

    def __init__(self, penalty: Callable[[], Iterable[Tensor]], **arguments: Any):
        super().__init__(**arguments)
        self.penalty = penalty
        self.last_penalty: Tensor | float = 0.0

    def change_gradients_(self) -> None:
        self.last_penalty = 0.0
        scaler = self.accelerator.scaler  # of float16: the other gradients are scaled
        for term in self.penalty():
            self.last_penalty = self.last_penalty + term.detach()
            (term if scaler is None else scaler.scale(term)).backward()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, "penalty": float(self.last_penalty)} if "loss" in logs else logs, *args, **kwargs)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the blocks by module path: all but the output head, as PEFT's ``all-linear`` has it."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
