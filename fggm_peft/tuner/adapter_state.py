"""``AdapterState``: the supports and values of the adapters of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.granularity import Granularity, Shape
from ..core.index_codec import index_dtype
from ..core.weight_delta import WeightDelta
from .files.indices import SupportIndices

if TYPE_CHECKING:
    from .config import FGGMConfig


class AdapterState(BaseTunerLayer):
    """The part of ``FGGMLayer`` that holds its adapters, like PEFT's ``LoraLayer``.

    All state is where torch can see it:

    - ``fggm_values[adapter]``: trainable, ``[k, i]`` for rows, ``[o, k]`` for columns, ``[k]`` for elements;
    - ``fggm_indices[adapter]``: ``[k]`` int32 (int64 if ``o * i`` reaches 2**31), sorted, unique; elements are flat
      indices ``o * i + i``.
    """

    adapter_layer_names = ("fggm_values",)
    other_param_names = ("fggm_indices", "scaling", "granularity", "selected", "quantized_merge")

    cast_input_dtype_enabled = True
    """For PEFT's ``disable_input_dtype_casting``. Inputs have the dtype of the base's output, so it has no effect."""
    weight_shape: Shape

    def __init__(self) -> None:
        self.fggm_values = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.granularity: dict[str, Granularity] = {}
        self.quantized_merge: dict[str, str] = {}
        self.selected: dict[str, bool] = {}  # False until the support is known
        self.fggm_indices = SupportIndices(self.selected)
        self._frozen_empty: set[str] = set()  # adapters that would train here if their support were not empty
        self._selected_in_shards: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(
        self, adapter_name: str, config: FGGMConfig, granularity: Granularity, inference_mode: bool = False
    ) -> None:
        """Add an adapter with an empty support, which changes nothing and trains nothing."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        shape = granularity.values_shape(self.weight_shape, 0)
        values = torch.empty(shape, device=device, dtype=self.values_dtype(config))
        self.fggm_values[adapter_name] = nn.Parameter(values)
        self.fggm_indices[adapter_name] = torch.empty(0, dtype=self.index_dtype, device=device)
        self.granularity[adapter_name] = granularity
        self.quantized_merge[adapter_name] = config.quantized_merge
        self.scaling[adapter_name] = 1.0
        self.selected[adapter_name] = False
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def index_dtype(self) -> torch.dtype:
        """int32, or int64 for a weight of 2**31 entries or more."""
        return index_dtype(self.weight_shape[0] * self.weight_shape[1])

    def empty_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The indices and the values of the adapter with an empty support."""
        shape = self.granularity[adapter_name].values_shape(self.weight_shape, 0)
        values = self.fggm_values[adapter_name].detach().new_zeros(shape)
        return {"indices": self.fggm_indices[adapter_name][:0], "values": values}

    def values_dtype(self, config: FGGMConfig) -> torch.dtype:
        """The config's ``training_dtype``, else the base weight's dtype if values can train in it."""
        if config.training_dtype is not None:
            return getattr(torch, config.training_dtype)
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32

    def resize_(self, adapter_name: str, k: int) -> None:
        """Resize the adapter to ``k`` units of zeros, which stay if they fit already.

        The parameter stays the same object, so that an existing optimizer trains the new size.
        """
        self.fggm_indices.settle(adapter_name)
        shape = self.granularity[adapter_name].values_shape(self.weight_shape, k)
        values, indices = self.fggm_values[adapter_name], self.fggm_indices[adapter_name]
        if values.shape != shape:
            trains = values.requires_grad or adapter_name in self._frozen_empty
            if isinstance(values, DTensor):  # FSDP2 keeps the old parameter; the new one can only be saved
                values = torch.zeros(shape, dtype=values.dtype, device=values.device)
                self.fggm_values[adapter_name] = nn.Parameter(values, requires_grad=trains)
                self._selected_in_shards.add(adapter_name)
            else:
                values.grad = None
                values.data = values.data.new_zeros(shape)
                values.requires_grad_(trains)
        if indices.shape != (k,) or indices.dtype == torch.uint8:
            self.fggm_indices[adapter_name] = indices.new_zeros(k, dtype=self.index_dtype)

    def set_support(self, adapter_name: str, indices: Tensor, generator: torch.Generator | None = None) -> None:
        """Set the units that train (``[k]``, sorted, unique), with values of zero, or normal ones for tests."""
        self.resize_(adapter_name, len(indices))
        self.fggm_indices[adapter_name].copy_(indices)
        data = self.fggm_values[adapter_name].detach()
        data.zero_() if generator is None else data.copy_(torch.randn(data.shape, generator=generator))
        self.selected[adapter_name] = True
        self.freeze_empty_()

    def freeze_empty_(self) -> None:
        """Freeze the values of empty supports: DDP would wait for their gradient, and FSDP2 and ZeRO-3 would fail."""
        for name, values in self.fggm_values.items():
            if not self.selected[name] or self.fggm_indices[name].numel():
                self._frozen_empty.discard(name)
            elif values.requires_grad:
                self._frozen_empty.add(name)
                values.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.freeze_empty_()

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze_empty_()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the delta of ``adapter`` by ``scale``; an adapter that is not in this layer is ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Like PEFT's, but keeps the dtype: float32 values must not pass through bfloat16."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for tensors in (self.fggm_values, self.fggm_indices):
            if device is not None and adapter_name in tensors and not tensors[adapter_name].is_meta:
                tensors[adapter_name] = tensors[adapter_name].to(device)

    def delta(self, adapter_name: str) -> WeightDelta:
        """The adapter's sparse delta of the weight."""
        return WeightDelta(
            self.granularity[adapter_name],
            self.fggm_indices[adapter_name],
            self.fggm_values[adapter_name],
            self.scaling[adapter_name],
        )

    def deltas(self, adapter_names: Sequence[str]) -> list[WeightDelta]:
        """The deltas of those adapters that have a support here which is not empty."""
        # checks the indices, because ZeRO-3 fetches a parameter that is accessed
        indices = self.fggm_indices
        return [self.delta(n) for n in adapter_names if self.selected.get(n) and indices[n].numel()]
