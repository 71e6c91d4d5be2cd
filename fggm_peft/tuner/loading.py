"""Checks a file's tensors against the model, then makes room for them.

Adapters come from strangers: every key, shape, dtype and index is checked before anything in the
model changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.errors import AdapterFileError
from ..core.granularity import Granularity, Shape
from .layer import FGGMLayer
from .room import fill_up_
from .sharding import plain_name


def fit_layers_to_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Resize the adapter's values and indices to those of a file that is about to be loaded.

    Args:
        model: has the adapter's layers.
        state_dict: keys as the model has them, adapter name included; changed in place where wrappers or
            DeepSpeed have left something out.

    Raises:
        AdapterFileError: a tensor is missing, or does not fit; names its key. Nothing has changed then.
    """
    sizes: dict[FGGMLayer, int] = {}
    paths: dict[FGGMLayer, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FGGMLayer) or adapter_name not in layer.fggm_values:
            continue
        name = plain_name(name)
        _complete_(state_dict, name, layer, adapter_name)
        keys = _Keys.of_layer(state_dict, name, adapter_name)
        if keys.absent():
            continue  # PEFT reports keys that are missing altogether
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is merged ({name}); call unmerge_adapter() before loading over it"
            )
        sizes[layer], paths[layer] = _checked_size(layer, adapter_name, keys), name
    for layer, k in sizes.items():
        if (room := layer.room.get(adapter_name)) is not None:
            fill_up_(state_dict, paths[layer], layer, adapter_name, room)
            k = room
        layer.resize_(adapter_name, k)
        layer.selected[adapter_name] = any(sizes.values())
        layer.freeze_empty_()


def _complete_(state_dict: dict[str, Tensor], name: str, layer: FGGMLayer, adapter_name: str) -> None:
    """Add what saving on several devices leaves out."""
    for part in ("values", "indices", "bias"):
        # PEFT adds the adapter's name by the names of modules, and misses those within torch's checkpoint_wrapper
        if (key := f"{name}.fggm_{part}") in state_dict:
            state_dict[f"{key}.{adapter_name}"] = state_dict.pop(key)
    indices = state_dict.get(f"{name}.fggm_indices.{adapter_name}")
    if indices is not None and not indices.numel():  # DeepSpeed saves nothing frozen, and empty values are
        values = layer.fggm_values[adapter_name].detach()
        shape = layer.granularity[adapter_name].values_shape(layer.weight_shape, 0)
        state_dict.setdefault(f"{name}.fggm_values.{adapter_name}", values.new_zeros(shape))
        if adapter_name in layer.fggm_bias:
            state_dict.setdefault(f"{name}.fggm_bias.{adapter_name}", values.new_zeros(0))


class _Keys:
    """The tensors of one layer in a file, and the names that errors give them."""

    def __init__(self, tensors: Mapping[str, Tensor | None], names: Mapping[str, str]):
        self.tensors, self.names = tensors, names

    @classmethod
    def of_layer(cls, state_dict: Mapping[str, Tensor], module: str, adapter_name: str) -> _Keys:
        names = {part: f"{module}.fggm_{part}.{adapter_name}" for part in ("indices", "values", "bias")}
        return cls({part: state_dict.get(name) for part, name in names.items()}, names)

    def absent(self) -> bool:
        return all(tensor is None for tensor in self.tensors.values())

    def require(self, part: str, legal: bool, problem: str) -> None:
        if not legal:
            raise AdapterFileError(
                f"{self.names[part]}: {problem}. The file was made for another base model or is damaged."
            )


def checked_support(granularity: Granularity, shape: Shape, tensors: Mapping[str, Tensor | None], where: str) -> int:
    """How many units a support holds.

    Args:
        tensors: its "indices" and "values".
        where: goes before the names of the tensors in errors.

    Raises:
        AdapterFileError: one is missing, or does not fit a weight of this shape.
    """
    return _checked_support(granularity, shape, _Keys(tensors, {part: f"{where}.fggm_{part}" for part in tensors}))


def _checked_size(layer: FGGMLayer, adapter_name: str, keys: _Keys) -> int:
    k = _checked_support(layer.granularity[adapter_name], layer.weight_shape, keys)
    bias = keys.tensors["bias"]
    if bias is not None:
        fits = bias.is_floating_point() and tuple(bias.shape) == (k,)
        keys.require("bias", fits, f"expected floating-point values [{k}], got {_describe(bias)}")
    room = layer.room.get(adapter_name, k)
    if k > room:
        raise AdapterFileError(
            f"{keys.names['indices']}: {k} units do not fit the room for {room} that "
            "prepare_model_for_compiled_hotswap has made; give it a higher density"
        )
    wanted = adapter_name in layer.fggm_bias
    keys.require("bias", wanted == (bias is not None), "bias entries are " + ("missing" if wanted else "unexpected"))
    return k


def _checked_support(granularity: Granularity, shape: Shape, keys: _Keys) -> int:
    indices, values = keys.tensors["indices"], keys.tensors["values"]
    for part, tensor in (("indices", indices), ("values", values)):
        keys.require(part, tensor is not None, "this tensor is missing")
    assert indices is not None and values is not None
    integer = indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1
    keys.require("indices", integer, f"expected a vector of int32 or int64, got {_describe(indices)}")
    k, units = len(indices), granularity.units(shape)
    if k and not indices.is_meta:
        low, high = int(indices.min()), int(indices.max())
        inside = low >= 0 and high < units
        keys.require("indices", inside, f"indices {low}..{high} do not fit the {units} {granularity.name}s here")
        rising = bool((indices[1:] > indices[:-1]).all())
        keys.require("indices", rising, "indices are not sorted and unique")
    expected = granularity.values_shape(shape, k)
    fits = values.is_floating_point() and tuple(values.shape) == expected
    keys.require("values", fits, f"expected floating-point values {list(expected)}, got {_describe(values)}")
    return k


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
