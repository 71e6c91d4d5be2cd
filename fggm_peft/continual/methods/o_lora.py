"""O-LoRA: a LoRA for each task, orthogonal to those of earlier tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ...tuner.target import outer_modules
from .method import METHODS
from .peft_method import PeftMethod

ADAPTER = "default"


@METHODS.register("o_lora")
@dataclass
class OLoRA(PeftMethod):
    """O-LoRA (arXiv 2310.14152, section 3): LoRA with a penalty on overlap with earlier tasks' subspaces.

    The loss of task t has ``penalty * sum_s ||A_s A_t^T||_F^2`` added, for each layer and each earlier task s, with A
    ``[r, i]``. Finished adapters are merged, which is equivalent to keeping them frozen beside the weight. ``memory``
    contains their A by module path, ``[tasks * r, i]``. (The authors' code uses absolute values instead of squares.)

    Args:
        penalty: weight of the penalty (the paper's lambda_1).
    """

    config_class = LoraConfig
    penalty: float = 0.5

    def penalties(self, model):
        for path, a in lora_a(model).items():
            if path in self.memory:
                yield self.penalty * (self.memory[path].to(a.device, a.dtype) @ a.mT).square().sum()

    def end_task(self, model, trainer, folder):
        for path, a in lora_a(model).items():
            earlier = [self.memory[path]] if path in self.memory else []
            self.memory[path] = torch.cat([*earlier, a.detach().cpu()])
        return super().end_task(model, trainer, folder)


def lora_a(model: nn.Module) -> dict[str, nn.Parameter]:
    """Module path in the base model -> A ``[r, i]`` of its adapter."""
    return {
        path: module.lora_A[ADAPTER].get_parameter("weight")
        for path, module in outer_modules(model)
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
