"""MIGU: gradients only for the output features with the largest magnitudes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...selection import linear_layers
from .method import METHODS, Method


@METHODS.register("migu")
@dataclass
class MIGU(Method):
    """MIGU (arXiv 2406.17245, section 3): full fine-tuning of the features with the largest outputs on a batch.

    For a linear layer with output y, the magnitude of feature o is the mean of |y_o| over the tokens of a step's
    batches (padding included), divided by the sum over features (its L1 norm). After the backward pass, the top
    ``1 - threshold`` of the features keep their gradient and the others get zero: W <- W - lr * (M * g). The mask
    applies to weights of the linear layers; embeddings, biases, norms and the head train without a mask. AdamW treats
    a zero gradient as usual (moments, weight decay). All this is as in the authors' code.

    Args:
        threshold: share of each layer's features without a gradient, in [0, 1).
        first_task_masked: False trains the first task without a mask, as in the authors' code.
    """

    threshold: float = 0.7
    first_task_masked: bool = True
    _magnitudes: dict[nn.Module, Tensor] = field(default_factory=dict, init=False, repr=False)
    _hooks: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold!r}")

    def begin_task(self, model, examples):
        if self.number or self.first_task_masked:
            self._hooks = [layer.register_forward_hook(self._record) for layer in linear_layers(model).values()]
        return super().begin_task(model, examples)

    def _record(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training:
            sums = output.detach().abs().flatten(0, -2).sum(0, dtype=torch.float32)
            self._magnitudes[layer] = self._magnitudes[layer] + sums if layer in self._magnitudes else sums

    def change_gradients_(self, model, trainer):
        for layer, magnitude in self._magnitudes.items():
            masked = ~largest_features(trainer.accelerator.reduce(magnitude), self.threshold)
            gradient = layer.get_parameter("weight").grad
            if gradient is not None:
                gradient.masked_fill_(masked if isinstance(layer, Conv1D) else masked[:, None], 0)  # Conv1D: [i, o]
        self._magnitudes.clear()

    def end_task(self, model, trainer, folder):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        return model


def largest_features(magnitude: Tensor, threshold: float) -> Tensor:
    """``[o]``, True for the top ``1 - threshold`` of the magnitudes ``[o]``, at least one."""
    count = max(1, round((1 - threshold) * len(magnitude)))
    return torch.zeros_like(magnitude, dtype=torch.bool).index_fill_(0, magnitude.topk(count).indices, True)
