"""``BaseWeight``: access to the weight of an adapted layer, whether it is quantized, offloaded or sharded."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from ..core.granularity import Shape
from ..core.linear import effective_weight
from .hosts.bitsandbytes import recover_quantization_state
from .hosts.offloading import execution_device, is_offloaded, offloaded_weight
from .hosts.sharding import whole
from .merging.sidecar import SidecarHook, sidecar_deltas

_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INPUT_QUANTIZATION = ("act_quant_kwargs", "activation_quantization")  # names in torchao's two families of tensors


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; tensors of inference mode do not know."""
    return 0 if tensor.is_inference() else tensor._version


class BaseWeight(BaseTunerLayer):
    """The part of ``FGGMLayer`` that reads the base layer's weight, a matrix ``[o, i]`` throughout the library."""

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any):
        self.base_layer = base_layer
        self.in_features, self.out_features = self._features()
        self._quantization_kwargs = quantization_kwargs
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)

    def _features(self) -> Any:
        """The number of input features and of output features, as PEFT defines them."""
        return _get_in_out_features(self.get_base_layer())

    def get_base_layer(self) -> nn.Module:
        """The innermost base layer. PEFT's version asks every layer for an attribute that most do not have: slow."""
        layer = self.base_layer
        while (inner := layer._modules.get("base_layer")) is not None:
            layer = inner
        return layer

    @property
    @abstractmethod
    def weight_shape(self) -> Shape:
        """``(o, i)`` of the weight as a matrix."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as ``[o, i]``; a view if the memory layout allows one."""
        return weight

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``."""
        return matrix

    def has_plain_forward(self) -> bool:
        """Whether the base layer computes exactly what its type stands for."""
        return True

    def weight_copy(self) -> Tensor:
        """The weight ``[o, i]`` in memory of its own, dequantized and with the sidecar's deltas."""
        if self.quantization_backend is None:
            return self.matrix(whole(self.get_base_weight().detach())).clone()
        recover_quantization_state(self.get_base_layer())
        return effective_weight(self.get_base_weight().detach(), sidecar_deltas(self.get_base_layer()))

    def weight_version(self) -> Hashable:
        """Differs after the weight was replaced or written into.

        Sharding is no change: FSDP2 restores the versions of its parameters, ZeRO-3 replaces only their data, and
        FSDP1's weights are no parameters while they are used.
        """
        base = self.base_layer
        has_own_memory = self.quantization_backend is None and not (dist.is_available() and dist.is_initialized())
        state: list[Hashable] = [id(base)]
        for name, parameter in base._parameters.items():
            if parameter is not None and name != "bias":
                memory = parameter.untyped_storage()._cdata if has_own_memory else 0
                state += (id(parameter), version_of(parameter), memory)
        return tuple(state)

    def get_base_weight(self) -> Tensor:
        """Like PEFT's, but returns an offloaded weight from the CPU or the disk, read-only."""
        weight = offloaded_weight(self.get_base_layer())
        return super().get_base_weight() if weight is None else weight

    def write_back_(self, weight: Tensor, matrix: Tensor) -> None:
        """Copy ``matrix`` to the stored weight, unless it is a view of it."""
        if matrix.data_ptr() != weight.data_ptr():
            weight.copy_(self.unmatrix(matrix))

    @property
    def device(self) -> torch.device | None:
        """The device on which the base layer computes."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """Like PEFT's, but also knows the device of an offloaded layer, and of HQQ's, whose weight has another name."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            device = next((parameter.device for parameter in base_layer.parameters()), None)
        return execution_device(base_layer) if is_offloaded(base_layer) else device, dtype

    def can_copy_weight(self) -> bool:
        """Whether the output may be computed from a copy of the weight, without calling the base layer."""
        base = self.base_layer
        if "base_layer" in base._modules or is_offloaded(base):
            return False
        for name in _HOOK_DICTS:
            if not all(isinstance(hook, SidecarHook) for hook in getattr(base, name).values()):
                return False
        if self.quantization_backend is not None:
            return self.quantization_backend.supports_merge
        return self.has_plain_forward() and not base.weight.requires_grad

    def needs_weight_for_gradients(self, x: Tensor) -> bool:
        """Whether autograd sees no dependence of the base layer's output on ``x``, because it quantizes its inputs."""
        weight = getattr(self.get_base_layer(), "weight", None)
        quantizes_inputs = any(getattr(weight, name, None) is not None for name in _INPUT_QUANTIZATION)
        return quantizes_inputs and x.requires_grad and torch.is_grad_enabled() and self.can_copy_weight()
