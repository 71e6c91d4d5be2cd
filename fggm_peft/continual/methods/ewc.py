"""Elastic weight consolidation: what earlier tasks need is held by springs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from ...core.granularity import ELEMENTS
from ...selection.data_pass import FisherPass
from ...tuner import FGGMConfig
from ...tuner.settings.selection import require_num_samples
from ...tuner.support import fggm_layers
from .gradients import PenalizedTrainer, linear_layers
from .method import METHODS, Method, train_only_

ADAPTER = "default"


@METHODS.register("ewc")
@dataclass
class EWC(Method):
    """Online EWC (arXiv 1612.00796; the online form: Progress & Compress, arXiv 1805.06370).

    The loss has ``penalty / 2 * sum F * (theta - theta*)^2`` added, with theta* the weights when the task begins. After
    each task ``F <- decay * F + F_task``, where F_task is the diagonal empirical Fisher information of this library's
    own pass: the mean over samples of the exact squared gradient of a sample's log-likelihood, summed over its
    answer's tokens.

    What is penalised is what trains: the weights of the linear layers. Embeddings, norms, biases and the head stay
    frozen, because F is not computed for them and nothing would hold them.

    Memory: 4 bytes for each trained weight (F in float32); while a task trains, as much again as the weights take
    (theta*); while F_task is computed, another 12 bytes for each (two halves of the samples, and F_task).

    Args:
        penalty: the paper's lambda. No default suits all: look for it together with the learning rate.
        decay: the online form's gamma, in [0, 1].
        num_samples: samples for F_task; None for all of the task's.
    """

    penalty: float = 1.0
    decay: float = 1.0
    num_samples: int | None = None
    _fisher: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_num_samples(self.num_samples)
        if self.penalty < 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"EWC needs penalty >= 0 and decay in [0, 1], got {self.penalty!r} and {self.decay!r}")

    def begin_task(self, model, number, examples):
        self._anchor = {name: model.get_parameter(name).detach().clone() for name in self._fisher}
        return train_only_(model, [f"{name}.weight" for name in linear_layers(model)])

    def trainer(self, **arguments: Any) -> Trainer:
        return PenalizedTrainer(partial(self.penalties, arguments["model"]), **arguments)

    def penalties(self, model: nn.Module) -> Iterator[Tensor]:
        """The penalty of each weight."""
        for name, anchor in self._anchor.items():
            weight = model.get_parameter(name)
            moved = weight.float() - anchor.float()
            yield self.penalty / 2 * (self._fisher[name].to(weight.device) * moved.square()).sum()

    def end_task(self, model, number, trainer, folder):
        self._anchor = {}
        for name, fisher in self.task_fisher(model, trainer).items():
            earlier = self._fisher.get(name)
            self._fisher[name] = fisher if earlier is None else earlier.to(fisher.device).mul_(self.decay).add_(fisher)
        return model

    def task_fisher(self, model: nn.Module, trainer: Trainer) -> dict[str, Tensor]:
        """Parameter name -> F of the trainer's data, float32, in the weight's shape."""
        targets = linear_layers(model)
        config = FGGMConfig(granularity=ELEMENTS, target_modules=list(targets))
        # the data in its own order: this draws nothing
        data = trainer.get_eval_dataloader(trainer.train_dataset)
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        try:
            layers = fggm_layers(adapted, ADAPTER)
            fisher_pass = FisherPass(adapted, config, ADAPTER, data, None, progress=False)
            totals = fisher_pass.run(layers, self.num_samples, None, 1, "Fisher of EWC")
            fisher = {}
            for name, layer in layers.items():
                mean = totals.mean(name, "fisher")
                fisher[f"{name}.weight"] = layer.unmatrix(mean.view(layer.weight_shape)).contiguous()
            return fisher
        finally:
            adapted.unload()

    def state_dict(self) -> dict[str, Tensor]:
        """Parameter name -> F."""
        return dict(self._fisher)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._fisher = {name: torch.clone(fisher) for name, fisher in state.items()}
