"""FGGM as in its paper: full fine-tuning with a mask on the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import find_targets
from ...tuner.files import history_of
from .fggm import FGGM
from .gradients import GradientTrainer
from .method import METHODS, train_all_, train_only_

ADAPTER = "default"


@METHODS.register("sft_masked")
@dataclass
class MaskedFineTuning(FGGM):
    """FGGM (arXiv 2601.18261, section 3): W <- W - lr * (M * g), with M from the same selection as ``fggm``.

    Optimizer state and gradients are as large as in full fine-tuning. Weights that are not targeted are frozen, as
    with an adapter. The units are selected when the trainer is constructed. Weight decay acts on the selected entries
    of the weight; in ``fggm`` it acts on the delta, so the results differ.
    """

    _number: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.get("bias", "none") != "none" or self.config.get("modules_to_save"):
            raise ValueError(f"{self.name!r} trains weights only: it supports neither bias nor modules_to_save")

    def begin_task(self, model, number, examples):
        self._number = number
        self.restore_history_(model)
        return model if self.is_masked(number) else train_all_(model)

    def trainer(self, **arguments: Any) -> Trainer:
        if not self.is_masked(self._number):
            return Trainer(**arguments)
        frozen = self.select(**arguments)
        train_only_(arguments["model"], list(frozen))
        return MaskedTrainer(frozen, **arguments)

    def select(self, model: nn.Module, **arguments: Any) -> dict[str, Tensor]:
        """Parameter name -> True for frozen entries, in the parameter's shape. The model is not changed."""
        adapted: Any = self.wrap(model, self._number)
        try:
            # create_optimizer selects on exactly the batches that FGGM would select on
            FGGMTrainer(**{**arguments, "model": adapted, "callbacks": None}).create_optimizer()
            frozen = {}
            for path, target in find_targets(adapted, ADAPTER).items():
                target.values.data.fill_(1)
                frozen[f"{path}.weight"] = target.layer.get_delta_weight(ADAPTER) == 0
            return frozen
        finally:
            adapted.unload()

    def end_task(self, model, number, trainer, folder):
        self._history = history_of(model)
        return model


class MaskedTrainer(GradientTrainer):
    """Trains with masked gradients. AdamW's moments and weight decay do not affect the masked entries.

    Args:
        frozen: parameter name -> True for frozen entries.
    """

    def __init__(self, frozen: Mapping[str, Tensor], **arguments: Any):
        super().__init__(**arguments)
        self.frozen = frozen

    def change_gradients_(self) -> None:
        for parameter, frozen in self._masked():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0)

    def _masked(self) -> list[tuple[nn.Parameter, Tensor]]:
        model = self.accelerator.unwrap_model(self.model)
        return [(model.get_parameter(name), frozen) for name, frozen in self.frozen.items()]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters without a mask; ``_decay`` applies the weight decay of masked parameters."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.frozen]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.weight_decay:
            optimizer.register_step_pre_hook(self._decay)
        return optimizer

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """AdamW's decoupled weight decay (arXiv 1711.05101), on the entries that may change."""
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, frozen in self._masked():
            decayed = parameter * (1 - rates[parameter] * self.args.weight_decay)
            parameter.copy_(torch.where(frozen, parameter, decayed))
