"""From an adapter's tensors in memory to those of a file: checked, rounded or made absolute, indices encoded."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.absolute import absolute_values
from ..core.errors import AdapterFileError
from ..core.index_codec import smallest_codec
from .adapter_file import DIGEST
from .base_check import base_difference, dense_weight, fingerprint
from .config import FGGMConfig
from .file_settings import describe_file
from .layer import FGGMLayer
from .sharding import plain_name
from .support import fggm_layers


class UntrainedAdapterWarning(UserWarning):
    """An adapter is being saved that changes nothing."""


def encode_for_file_(model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Turn the tensors of an adapter into those that a file holds, in place; the config gets what a file says.

    Args:
        state_dict: keys as the model has them, adapter name included.

    Raises:
        AdapterFileError: a value is NaN or infinite, also after rounding; names the module.
        ValueError: ``values="absolute"`` where the base does not give its entries.
    """
    keys = {plain_name(key): key for key in state_dict}
    layers = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, FGGMLayer)}
    moved = chosen = False
    densities = {}
    for name, layer in layers.items():
        found = {part: keys.get(f"{name}.fggm_{part}.{adapter_name}") for part in ("indices", "values", "bias")}
        tensors = {part: state_dict[key] for part, key in found.items() if key is not None}
        if not {"indices", "values"} <= tensors.keys() or any(_is_elsewhere(tensor) for tensor in tensors.values()):
            continue
        module = name.removeprefix("base_model.model.")
        encoded = _encoded(layer, config, adapter_name, tensors, module)
        for key in found.values():
            state_dict.pop(key, None)
        state_dict |= {f"{name}.fggm_{part}.{adapter_name}": tensor for part, tensor in encoded.items()}
        k, n = len(tensors["indices"]), layer.granularity[adapter_name].units(layer.weight_shape)
        densities[module] = k / max(1, n)
        chosen |= k > 0
        moved |= any(bool(tensors[part].any()) for part in ("values", "bias") if part in tensors)
    if densities:
        _warn_if_nothing_moves(adapter_name, chosen, moved)
        describe_file(config, densities)
        refresh_fingerprint(model, config, adapter_name)


def refresh_fingerprint(model: nn.Module, config: FGGMConfig, adapter_name: str) -> None:
    """Let the config have the fingerprint of the base that its adapter is on.

    One that fits is kept, as it may come from the unquantized base.
    """
    layers = fggm_layers(model, adapter_name)
    kept = config.base_fingerprint or {}
    if kept.keys() != layers.keys() or base_difference(layers, kept) is not None:
        config.base_fingerprint = fingerprint(layers)


def _is_elsewhere(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) or tensor.is_meta


def _encoded(
    layer: FGGMLayer, config: FGGMConfig, adapter_name: str, tensors: dict[str, Tensor], module: str
) -> dict[str, Tensor]:
    """Part -> tensor of one module."""
    granularity, shape = layer.granularity[adapter_name], layer.weight_shape
    indices, n = tensors["indices"], layer.granularity[adapter_name].units(shape)
    encoded = {part: tensors[part] for part in ("values", "bias") if part in tensors}
    if config.delta_dtype is not None:
        dtype = getattr(torch, config.delta_dtype)
        encoded = {part: tensor.to(dtype) for part, tensor in encoded.items()}
    for part, tensor in encoded.items():
        if not torch.isfinite(tensor).all():
            rounded = "" if config.delta_dtype is None else f" as {config.delta_dtype}"
            raise AdapterFileError(
                f"{module}: a number of its {part} is NaN or infinite{rounded}, so the adapter is not saved. Go back "
                "to an earlier checkpoint, or lower the learning rate."
            )
    if config.values == "absolute":
        try:
            weight = dense_weight(layer)
            place = indices.to(weight.device)
            new, encoded[DIGEST] = absolute_values(granularity, weight, place, tensors["values"].to(weight.device))
        except ValueError as error:
            raise ValueError(f"{module}: values='absolute' cannot be saved: {error}") from error
        encoded["values"] = new
    codec = smallest_codec(granularity.index_codecs, indices, n)
    return encoded | dict(zip(codec.parts, codec.encode(indices, n), strict=True))


def _warn_if_nothing_moves(adapter_name: str, chosen: bool, moved: bool) -> None:
    if moved:
        return
    what = "has no values: nothing was chosen" if not chosen else "holds values of zero only: nothing was trained"
    warnings.warn(f"the adapter {adapter_name!r} {what}", UntrainedAdapterWarning, stacklevel=4)
