"""The parameters of a model that change the weights of its linear layers, and how each of them decays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.shira.layer import ShiraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from ..core.harm_decay import Decay, DiagonalDecay, SpectralDecay
from ..tuner.files.input_covariance import InputCovariance
from ..tuner.layer import FGGMLayer
from ..tuner.target import Target, outer_modules


class Trained(NamedTuple):
    """A parameter that changes the weight of a linear layer.

    Args:
        name: of the parameter.
        parameter: the values.
        support: what the values belong to; another object after another selection.
        decay: makes the decay, on the parameter's device.
    """

    name: str
    parameter: nn.Parameter
    support: Any
    decay: Callable[[], Decay]


def trained_parameters(model: nn.Module, covariance: InputCovariance, offload: bool) -> Iterator[Trained]:
    """The trained parameters of all layers that the covariance contains, as the model is now.

    Args:
        offload: keep the start of weights that train themselves on the CPU.
    """
    for path, module in outer_modules(model):
        if path not in covariance:
            continue
        if isinstance(module, FGGMLayer):
            for adapter_name in module.fggm_values:
                yield _of_target(Target(path, module, adapter_name), covariance)
        elif isinstance(module, LoraLayer):
            for adapter_name, layer in module.lora_A.items():
                # B A (I + sigma C)^-1: only A meets the inputs
                a: Any = layer.weight
                yield Trained(f"{path}/{adapter_name}", a, None, _whole(a, path, covariance))
        elif isinstance(module, ShiraLayer):
            weight: Any
            for adapter_name, weight in module.shira_weight.items():
                indices = module.shira_indices[adapter_name]
                yield Trained(f"{path}/{adapter_name}", weight, indices, _of_shira(weight, indices, path, covariance))
        elif isinstance(module, (nn.Linear, Conv1D)) and module.weight.requires_grad:
            parameter: Any = module.weight
            yield Trained(f"{path}/weight", parameter, None, _start(module, path, covariance, offload))


def _of_target(target: Target, covariance: InputCovariance) -> Trained:
    def decay() -> Decay:
        own = covariance[target.path].to(target.indices.device)
        return target.granularity.decay(own, target.indices, target.shape)

    return Trained(f"{target.path}/{target.adapter_name}", target.values, target.indices, decay)


def _whole(parameter: Tensor, path: str, covariance: InputCovariance) -> Callable[[], Decay]:
    return lambda: SpectralDecay(covariance[path].to(parameter.device).spectrum())


def _of_shira(weight: Tensor, indices: Tensor, path: str, covariance: InputCovariance) -> Callable[[], Decay]:
    return lambda: DiagonalDecay(covariance[path].to(weight.device).diagonal()[indices[1].long().to(weight.device)])


def _start(module: nn.Module, path: str, covariance: InputCovariance, offload: bool) -> Callable[[], Decay]:
    def decay() -> Decay:
        weight = _local(module.weight).detach()
        start = weight.cpu() if offload and weight.device.type != "cpu" else weight.clone()
        return DecayToStart(_whole(weight, path, covariance)(), start, isinstance(module, Conv1D))

    return decay


@dataclass(frozen=True, eq=False)
class DecayToStart(Decay):
    """Harm decay of the difference of a weight from its values at the start of training.

    Args:
        decay: of the difference, ``[o, i]``.
        start: the weight at the start.
        is_transposed: the weight is ``[i, o]``.
    """

    decay: Decay
    start: Tensor
    is_transposed: bool = False

    def _difference(self, values: Tensor) -> Tensor:
        difference = values.float() - self.start.to(values.device).float()
        return difference.mT if self.is_transposed else difference

    def shrunk(self, values, sigma):
        difference = self._difference(values)
        removed = difference - self.decay.shrunk(difference, sigma)
        return values.float() - (removed.mT if self.is_transposed else removed)

    def harm(self, values):
        return self.decay.harm(self._difference(values))


def shrink_(parameter: Tensor, decay: Decay, sigma: float) -> None:
    """Apply one step of harm decay to a parameter, or to the shard of it that this process has."""
    if isinstance(parameter, DTensor) and isinstance(decay, DiagonalDecay):
        decay = DiagonalDecay(distribute_tensor(decay.energy, parameter.device_mesh, parameter.placements).to_local())
    local = _local(parameter)
    if local.numel():
        with torch.autocast(local.device.type, enabled=False):
            local.copy_(decay.shrunk(local, sigma))


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
