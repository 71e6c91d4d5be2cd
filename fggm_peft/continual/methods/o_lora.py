"""O-LoRA: a LoRA for each task, orthogonal to those of earlier tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer

from .gradients import PenalizedTrainer
from .method import METHODS
from .peft_method import PeftMethod

ADAPTER = "default"


@METHODS.register("o_lora")
@dataclass
class OLoRA(PeftMethod):
    """O-LoRA (arXiv 2310.14152, section 3): LoRA with a penalty on overlap with earlier tasks' subspaces.

    The loss of task t has ``penalty * sum_s ||A_s A_t^T||_F^2`` added, for each layer and each earlier task s, with A
    ``[r, i]``. Finished adapters are merged, which is equivalent to keeping them frozen beside the weight; their A are
    stored: ``r * i`` numbers for each layer and task. (The authors' code uses absolute values instead of squares.)

    Args:
        penalty: weight of the penalty (the paper's lambda_1).
    """

    config_class = LoraConfig
    penalty: float = 0.5
    _earlier: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def trainer(self, **arguments: Any) -> Trainer:
        return PenalizedTrainer(partial(self.penalties, arguments["model"]), **arguments)

    def penalties(self, model: nn.Module) -> Iterator[Tensor]:
        """The penalty of each layer that has earlier tasks."""
        for path, a in lora_a(model).items():
            if path in self._earlier:
                earlier = self._earlier[path].to(a.device, a.dtype)
                yield self.penalty * (earlier @ a.mT).square().sum()

    def end_task(self, model, number, trainer, folder):
        for path, a in lora_a(model).items():
            earlier = [self._earlier[path]] if path in self._earlier else []
            self._earlier[path] = torch.cat([*earlier, a.detach().cpu()])
        return super().end_task(model, number, trainer, folder)

    def state_dict(self) -> dict[str, Tensor]:
        """Module path -> the A of all finished tasks, ``[tasks * r, i]``."""
        return dict(self._earlier)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._earlier = dict(state)


def lora_a(model: nn.Module) -> dict[str, nn.Parameter]:
    """Module path in the base model -> A ``[r, i]`` of its adapter."""
    return {
        name.removeprefix("base_model.model."): module.lora_A[ADAPTER].get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
