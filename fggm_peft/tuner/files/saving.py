"""Converts an adapter's tensors to those of a file: checks them, rounds the values and encodes the indices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...core.errors import AdapterFileError
from ...core.finite import all_finite
from ...core.granularity import Granularity, Shape
from ...core.index_codec import ENCODED_PARTS, smallest_codec
from ..config import FGGMConfig
from ..hosts.sharding import plain_name
from ..layer import FGGMLayer
from ..support import fggm_layers
from .base_check import base_difference, fingerprint
from .tensors import PARTS, PREFIX


class UntrainedAdapterWarning(UserWarning):
    """An adapter is being saved that changes nothing."""


def encode_for_file_(model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Turn the tensors of an adapter into those that a file holds, in place; the config gets what a file says.

    Args:
        state_dict: keys as the model has them, adapter name included.

    Raises:
        AdapterFileError: a value is NaN or infinite, also after rounding; names the module.
    """
    keys = {plain_name(key): key for key in state_dict}
    layers = {plain_name(n): m for n, m in model.named_modules() if isinstance(m, FGGMLayer)}
    moved = False
    written: dict[str, dict[str, Tensor]] = {}
    densities: dict[str, float] = {}
    for name, layer in layers.items():
        found = {part: keys.get(f"{name}.fggm_{part}.{adapter_name}") for part in ("indices", "values", "bias")}
        tensors = {part: state_dict[key] for part, key in found.items() if key is not None}
        if adapter_name in layer.fggm_indices.awaited:  # there is room for a support, and none has come
            tensors = layer.nothing(adapter_name)
            for part in PARTS:
                state_dict.pop(keys.get(f"{name}.fggm_{part}.{adapter_name}", ""), None)
        if not {"indices", "values"} <= tensors.keys() or any(_is_elsewhere(tensor) for tensor in tensors.values()):
            continue
        module = name.removeprefix(PREFIX)
        granularity, shape = layer.granularity[adapter_name], layer.weight_shape
        written[module] = encoded(granularity, shape, config, tensors, module)
        densities[module] = len(tensors["indices"]) / max(1, granularity.units(shape))
        for key in found.values():
            state_dict.pop(key, None)
        state_dict |= {f"{name}.fggm_{part}.{adapter_name}": tensor for part, tensor in written[module].items()}
        moved |= any(bool(tensors[part].any()) for part in ("values", "bias") if part in tensors)
    if written:
        _warn_if_nothing_moves(adapter_name, any(densities.values()), moved)
        config.describe_file(densities)
        refresh_fingerprint(model, config, adapter_name)
    _describe_shapes(model, config, adapter_name, written)


def _describe_shapes(
    model: nn.Module, config: FGGMConfig, adapter_name: str, written: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Let the config say how large the supports are, and the tensors that encode them, if there are any."""
    layers = fggm_layers(model, adapter_name)
    known = any(layer.selected[adapter_name] for layer in layers.values())
    sizes = {name: len(layer.fggm_indices[adapter_name]) for name, layer in layers.items()}
    config.support_sizes = sizes if known else None
    config.index_shapes = index_shapes(written) if known else None


def index_shapes(written: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, list[int]]] | None:
    """Module -> part -> shape, of the indices that are encoded; None if none are."""
    found = {
        name: {part: list(tensors[part].shape) for part in ENCODED_PARTS if part in tensors}
        for name, tensors in written.items()
    }
    return {name: shapes for name, shapes in found.items() if shapes} or None


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


def encoded(
    granularity: Granularity,
    shape: Shape,
    config: FGGMConfig,
    tensors: Mapping[str, Tensor],
    module: str,
) -> dict[str, Tensor]:
    """Part -> tensor of one module, as a file holds them.

    Args:
        tensors: "indices", "values" and perhaps "bias".
        module: named in errors.

    Raises:
        AdapterFileError: a value is NaN or infinite, also after rounding.
    """
    indices, n = tensors["indices"], granularity.units(shape)
    found = {part: tensors[part] for part in ("values", "bias") if part in tensors}
    if config.delta_dtype is not None:
        dtype = getattr(torch, config.delta_dtype)
        found = {part: tensor.to(dtype) for part, tensor in found.items()}
    for part, tensor in found.items():
        if not all_finite(tensor):
            rounded = "" if config.delta_dtype is None else f" as {config.delta_dtype}"
            raise AdapterFileError(
                f"{module}: a number of its {part} is NaN or infinite{rounded}, so the adapter is not saved. Go back "
                "to an earlier checkpoint, or lower the learning rate."
            )
    codec = smallest_codec(granularity.index_codecs, indices, n)
    return found | dict(zip(codec.parts, codec.encode(indices, n), strict=True))


def _warn_if_nothing_moves(adapter_name: str, chosen: bool, moved: bool) -> None:
    if moved:
        return
    what = "has no values: nothing was chosen" if not chosen else "holds values of zero only: nothing was trained"
    warnings.warn(f"the adapter {adapter_name!r} {what}", UntrainedAdapterWarning, stacklevel=4)


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Save adapters without rounding inside this context, whatever ``delta_dtype`` their configs name.

    Training that resumes from rounded values would give other results.
    """
    configs = [c for c in (getattr(model, "peft_config", None) or {}).values() if isinstance(c, FGGMConfig)]
    dtypes = [config.delta_dtype for config in configs]
    try:
        for config in configs:
            config.delta_dtype = None
        yield
    finally:
        for config, dtype in zip(configs, dtypes, strict=True):
            config.delta_dtype = dtype
