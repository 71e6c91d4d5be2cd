"""The parameters of a model that change the weights of its linear layers, and how each of them decays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.shira.layer import ShiraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from ..core.covariance import Covariance
from ..core.harm_decay import Decay, DiagonalDecay, SpectralDecay
from ..selection.input_covariance import input_width, is_linear
from ..tuner.base_weight import version_of
from ..tuner.files.input_covariance import InputCovariance
from ..tuner.hosts.zero import set_whole_values_, whole_values
from ..tuner.layer import FGGMLayer
from ..tuner.target import Target, outer_modules


class Trained(NamedTuple):
    """A parameter that changes the weight of a linear layer.

    Args:
        path: of the layer.
        name: of the parameter in the layer.
        width: number of the layer's input features; None if the layer is not linear.
        parameter: the values.
        decay: makes the decay from the covariance of the layer's inputs on the parameter's device.
        is_current: whether the decay is still that of the parameter: an adapter may be selected again or deleted.
    """

    path: str
    name: str
    width: int | None
    parameter: Any
    decay: Callable[[Covariance], Decay]
    is_current: Callable[[], bool] = lambda: True


def trained_parameters(model: nn.Module, covariance: InputCovariance, offload: bool) -> Iterator[Trained]:
    """The trained parameters of all adapters, and of other layers that the covariance contains, as the model is now.

    Args:
        offload: keep the start of weights that train themselves on the CPU.
    """
    for path, module in outer_modules(model):
        if isinstance(module, FGGMLayer):
            for name in module.fggm_values:
                target = Target(path, module, name)
                decay = partial(_of_target, target)
                yield Trained(path, name, target.shape[1], target.values, decay, _unchanged(target))
        elif isinstance(module, LoraLayer):
            for name, layer in module.lora_A.items():  # B A (I + sigma C)^-1: only A meets the inputs
                yield Trained(path, name, _width(module), layer.weight, _of_matrix)
            for name, weight in module.lora_embedding_A.items():
                yield Trained(path, name, None, weight, _of_matrix)
        elif isinstance(module, ShiraLayer):
            for name, weight in module.shira_weight.items():
                decay = partial(_of_entries, module.shira_indices[name][1])
                yield Trained(path, name, _width(module), weight, decay)
        elif path in covariance and isinstance(module, (nn.Linear, Conv1D)) and module.weight.requires_grad:
            yield Trained(path, "weight", input_width(module), module.weight, partial(_of_weight, module, offload))


def _width(adapter: nn.Module) -> int | None:
    # PEFT's ParamWrapper adapts a parameter, such as the experts of a mixture
    return input_width(adapter) if is_linear(adapter) and not isinstance(adapter, ParamWrapper) else None


def _unchanged(target: Target) -> Callable[[], bool]:
    """Whether a target still has its support. A selection of the same size writes into the same indices."""
    values, indices, version = target.values, target.indices, version_of(target.indices)

    def is_unchanged() -> bool:
        if target.adapter_name not in target.layer.fggm_values or target.values is not values:
            return False
        return target.indices is indices and version_of(indices) == version

    return is_unchanged


def _of_target(target: Target, covariance: Covariance) -> Decay:
    return target.granularity.decay(covariance, target.indices, target.shape)


def _of_matrix(covariance: Covariance) -> Decay:
    return SpectralDecay(covariance.spectrum())


def _of_entries(features: Tensor, covariance: Covariance) -> Decay:
    diagonal = covariance.diagonal()
    return DiagonalDecay(diagonal[features.long().to(diagonal.device)])


def _of_weight(module: nn.Module, offload: bool, covariance: Covariance) -> Decay:
    whole = whole_values(module.weight)
    weight = _local(module.weight).detach() if whole is None else whole
    start = weight.cpu() if offload and weight.device.type != "cpu" else weight.clone()
    return DecayToStart(_of_matrix(covariance), start, isinstance(module, Conv1D))


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
    """Apply one step of harm decay to a parameter, or to the shard of it that this process has.

    Under ZeRO, all processes must call this, in the step of the optimizer.
    """
    if (whole := whole_values(parameter)) is not None:
        set_whole_values_(parameter, decay.shrunk(whole, sigma))
        return
    if isinstance(parameter, DTensor) and isinstance(decay, DiagonalDecay):
        decay = DiagonalDecay(distribute_tensor(decay.energy, parameter.device_mesh, parameter.placements).to_local())
    local = _local(parameter)
    if local.numel():
        with torch.autocast(local.device.type, enabled=False):
            local.copy_(decay.shrunk(local, sigma))


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
