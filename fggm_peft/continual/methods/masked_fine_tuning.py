"""FGGM as in its paper: full fine-tuning with a mask on the gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ...training import FGGMTrainer
from ...tuner import find_targets
from .fggm import FGGM
from .method import METHODS, MethodTrainer, train_only_

ADAPTER = "default"


@METHODS.register("sft_masked")
@dataclass
class MaskedFineTuning(FGGM):
    """FGGM (arXiv 2601.18261, section 3): W <- W - lr * (M * g), with M from the same selection as ``fggm``.

    Optimizer state and gradients are as large as in full fine-tuning. Weights that are not targeted are frozen, as
    with an adapter. The units are selected when the trainer is constructed. Weight decay acts on the selected entries
    of the weight; in ``fggm`` it acts on the delta, so the results differ.

    Attributes:
        frozen: parameter name -> True for entries that the current task does not change, in the parameter's shape.
    """

    frozen: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _weight_decay: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.get("bias", "none") != "none" or self.config.get("modules_to_save"):
            raise ValueError(f"{self.name!r} trains weights only: it supports neither bias nor modules_to_save")
        config: Any = self.make_config()
        if config.harm_decay:
            raise ValueError(f"{self.name!r} does not support harm_decay; use 'fggm', which makes the same changes")

    @property
    def supports_quantized(self):
        return False

    def begin_task(self, model, examples):
        self.restore_history_(model)
        return model if self.is_masked else model.requires_grad_(True)

    def trainer(self, **arguments: Any) -> Trainer:
        self.frozen = self._select(**arguments) if self.is_masked else {}
        if self.frozen:
            train_only_(arguments["model"], self.frozen)
            args = arguments["args"] = copy.copy(arguments["args"])
            # the optimizer would also shrink the frozen entries
            self._weight_decay, args.weight_decay = args.weight_decay, 0.0
        return MethodTrainer(self, **arguments)

    def _select(self, model: nn.Module, **arguments: Any) -> dict[str, Tensor]:
        """The frozen entries. The model is not changed."""
        adapted: Any = self.wrap(model)
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

    @torch.no_grad()
    def change_gradients_(self, model, trainer):
        """Mask gradients, and with them AdamW's moments; decay the other entries as AdamW does (arXiv 1711.05101)."""
        decayed = 1 - trainer.optimizer.param_groups[0]["lr"] * self._weight_decay
        for name, frozen in self.frozen.items():
            parameter = model.get_parameter(name)
            if parameter.grad is not None:
                parameter.grad.masked_fill_(frozen, 0)
            if self._weight_decay:
                parameter.copy_(torch.where(frozen, parameter, parameter * decayed))

    def end_task(self, model, trainer, folder):
        self.keep_history(model)
        return model
