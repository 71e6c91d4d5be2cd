"""Room that an adapter's supports always take, so that another adapter in their place changes no shape.

A support is filled up with units whose values are zero: it stays sorted and unique, and the delta what it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.weight_delta import spread

if TYPE_CHECKING:
    from ..layer import FGGMLayer


def make_room_(layer: FGGMLayer, adapter_name: str, size: int) -> None:
    """Fill the adapter's support up to ``size`` units, as whatever is loaded into its place will be."""
    state = {f".fggm_indices.{adapter_name}": layer.fggm_indices[adapter_name].clone()}
    state[f".fggm_values.{adapter_name}"] = layer.fggm_values[adapter_name].detach().clone()
    if adapter_name in layer.fggm_bias:
        state[f".fggm_bias.{adapter_name}"] = layer.fggm_bias[adapter_name].detach().clone()
    fill_up_(state, "", layer, adapter_name, size)
    layer.resize_(adapter_name, size)
    layer.fggm_indices[adapter_name].copy_(state[f".fggm_indices.{adapter_name}"])
    for parameter, part in zip(layer.trained(adapter_name), ("values", "bias"), strict=False):
        parameter.data.copy_(state[f".fggm_{part}.{adapter_name}"])
    layer.room[adapter_name] = size
    layer.freeze_empty_()


def fill_up_(state_dict: dict[str, Tensor], module: str, layer: FGGMLayer, adapter_name: str, size: int) -> None:
    """Fill up the support that a state dict has of one layer.

    Args:
        state_dict: changed in place.
        module: the layer's path, with which the keys begin.
        size: at least as many units as there are.
    """
    keys = {part: f"{module}.fggm_{part}.{adapter_name}" for part in ("indices", "values", "bias")}
    old, dim = state_dict[keys["indices"]], layer.granularity[adapter_name].unit_dim
    indices = filled_up(old, size)
    state_dict[keys["indices"]] = indices
    state_dict[keys["values"]] = spread(state_dict[keys["values"]], old, indices, dim)
    if keys["bias"] in state_dict:
        state_dict[keys["bias"]] = spread(state_dict[keys["bias"]], old, indices, 0)


def filled_up(indices: Tensor, size: int) -> Tensor:
    """The indices and the lowest others, ``[size]``, sorted."""
    free = torch.ones(size, dtype=torch.bool, device=indices.device)  # among as many units there are enough
    free[indices[indices < size].long()] = False
    added = free.nonzero()[: size - len(indices), 0].to(indices.dtype)
    return torch.cat([indices, added]).sort().values
