"""Gradients only for the output features that a batch drives hardest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from .fine_tuning import FineTuning
from .gradients import GradientTrainer, linear_layers
from .method import METHODS


@METHODS.register("migu")
@dataclass
class MIGU(FineTuning):
    """MIGU (arXiv 2406.17245, section 3): full fine-tuning where a batch moves the features it drives hardest.

    For a linear layer with output y, the magnitude of feature o is the mean of |y_o| over the tokens of a step's
    batches (padding included), divided by the sum over features (its L1 norm). After the backward pass the gradient is
    kept for the top ``1 - threshold`` of the features and set to zero for the others: W <- W - lr * (M * g). Weights of
    the linear layers of the blocks only; embeddings, biases, norms and the head train plainly. What AdamW makes of
    a zero gradient (moments, weight decay) is left as it is. All this is as in the authors' code.

    Args:
        threshold: share of each layer's features without a gradient, in [0, 1).
        first_task_masked: False trains the first task plainly, as the authors' code does.
    """

    threshold: float = 0.7
    first_task_masked: bool = True
    _number: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold!r}")

    def begin_task(self, model, number, examples):
        self._number = number
        return super().begin_task(model, number, examples)

    def trainer(self, **arguments: Any) -> Trainer:
        if self._number == 0 and not self.first_task_masked:
            return super().trainer(**arguments)
        return MIGUTrainer(self.threshold, **arguments)


class MIGUTrainer(GradientTrainer):
    """Records output magnitudes while it trains, and masks gradients by them."""

    def __init__(self, threshold: float, **arguments: Any):
        super().__init__(**arguments)
        self.threshold = threshold
        self.magnitudes: dict[nn.Module, Tensor] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        model = self.accelerator.unwrap_model(self.model)
        handles = [layer.register_forward_hook(self._record) for layer in linear_layers(model).values()]
        try:
            return super().train(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self.magnitudes.clear()

    def _record(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        if layer.training:
            sums = output.detach().abs().flatten(0, -2).sum(0, dtype=torch.float32)
            self.magnitudes[layer] = self.magnitudes[layer] + sums if layer in self.magnitudes else sums

    def change_gradients_(self) -> None:
        for layer, magnitude in self.magnitudes.items():
            masked = ~kept_features(self.accelerator.reduce(magnitude), self.threshold)
            gradient = layer.get_parameter("weight").grad
            if gradient is not None:
                gradient.masked_fill_(masked if isinstance(layer, Conv1D) else masked[:, None], 0)  # Conv1D: [i, o]
        self.magnitudes.clear()


def kept_features(magnitude: Tensor, threshold: float) -> Tensor:
    """The top ``1 - threshold`` of the output features, at least one.

    Args:
        magnitude: ``[o]``, not negative; summed over tokens or their mean, normalised or not: the choice is the same.

    Returns:
        ``[o]``, True for features that keep their gradient.
    """
    count = max(1, round((1 - threshold) * len(magnitude)))
    kept = torch.zeros_like(magnitude, dtype=torch.bool)
    kept[magnitude.topk(count).indices] = True
    return kept
