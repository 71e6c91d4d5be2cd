"""``Target``: a weight that an adapter may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core.granularity import Granularity, Shape
from ..core.weight_delta import WeightDelta
from .hosts.sharding import path_in_base, without_wrappers

if TYPE_CHECKING:
    from .layer import FGGMLayer


@dataclass(frozen=True, eq=False)
class Target:
    """One weight of the base model, as one adapter sees it: a layer, its module path, and the name of the adapter."""

    path: str
    layer: FGGMLayer
    adapter_name: str

    @property
    def shape(self) -> Shape:
        """``(o, i)`` of the weight as a matrix."""
        return self.layer.weight_shape

    @property
    def granularity(self) -> Granularity:
        return self.layer.granularity[self.adapter_name]

    @property
    def units(self) -> int:
        """Number of units to choose from."""
        return self.granularity.units(self.shape)

    @property
    def unit_size(self) -> int:
        """Number of values that one unit trains."""
        return self.granularity.parameters_per_unit(self.shape)

    @property
    def indices(self) -> Tensor:
        """``[k]`` sorted indices of the units that may change."""
        return self.layer.fggm_indices[self.adapter_name]

    @property
    def values(self) -> nn.Parameter:
        """The trainable values on the support, ``granularity.values_shape(shape, k)``."""
        return self.layer.fggm_values[self.adapter_name]

    @property
    def is_selected(self) -> bool:
        """Whether the support is known."""
        return self.layer.selected[self.adapter_name]

    @property
    def is_merged(self) -> bool:
        return self.adapter_name in self.layer.merged_adapters

    @property
    def scale(self) -> float:
        return self.layer.scaling[self.adapter_name]

    def delta(self) -> WeightDelta:
        """The support, values and scale as a sparse delta of the weight."""
        return self.layer.delta(self.adapter_name)


Targets = dict[str, Target]
"""Module path -> target, in the order of the model."""


def find_targets(model: nn.Module, adapter_name: str) -> Targets:
    """The weights that an adapter may change, by module path in the base model; empty if no layer has the adapter."""
    from .layer import FGGMLayer

    modules = without_wrappers(model).named_modules()
    paths = {path_in_base(name): module for name, module in modules if isinstance(module, FGGMLayer)}
    return {
        path: Target(path, layer, adapter_name) for path, layer in paths.items() if adapter_name in layer.fggm_values
    }


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by module path in the base model, without the parts of adapted layers."""
    inner: set[int] = set()
    for name, module in without_wrappers(model).named_modules():
        if isinstance(module, BaseTunerLayer):
            inner |= {id(part) for part in module.modules() if part is not module}  # type: ignore[attr-defined]
        if id(module) not in inner:
            yield path_in_base(name), module
