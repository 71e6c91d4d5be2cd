"""Reads adapter files without a model: everything is decoded and checked before it is returned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_quantization_kwargs
from torch import Tensor, nn

from ...core.errors import AdapterFileError, BaseMismatchError
from ...core.fingerprint import sketches_from
from ...core.granularity import Shape
from ...core.ranking import all_finite
from ..config import FGGMConfig
from ..hosts.sharding import path_in_base
from ..layer import FGGMLayer
from ..layer_types import make_layer
from ..parameters import parameter_layer
from .hub import from_hub, user_path
from .tensors import MARK, checked_delta, delta_keys, opened, split_key

Delta = dict[str, Tensor]


def read_deltas(config: FGGMConfig, file: Path) -> tuple[dict[str, tuple[Shape, Delta]], dict[str, Tensor]]:
    """Read and check everything in an adapter's file, from the result of ``find_adapter``.

    Returns:
        Module path -> shape of the weight, and ``indices`` and ``values``; and the other tensors of the file by key.
    """
    with opened(file) as tensors:
        keys = delta_keys(tensors.keys())
        modules = {path: {part: tensors.get_tensor(key) for part, key in parts.items()} for path, parts in keys.items()}
        others = {key: tensors.get_tensor(key) for key in sorted(tensors.keys()) if split_key(key) is None}
    for key, tensor in others.items():
        _require_expected(key, tensor, config, file)
    sketches, deltas = sketches_from(config.base_fingerprint or {}), {}
    for path, tensors in modules.items():
        if path not in sketches:
            raise AdapterFileError(f"{file}: base_fingerprint in {CONFIG_NAME} has no shape of {path}")
        shape = sketches[path].shape
        try:
            granularity = config.granularity.of_weight(path, shape)
        except ValueError as error:
            raise AdapterFileError(f"{file}: {error}") from error
        deltas[path] = shape, checked_delta(tensors, granularity, shape, f"{file}: {path}{MARK}")
    if config.support_sizes not in (None, {path: len(delta["indices"]) for path, (_, delta) in deltas.items()}):
        raise AdapterFileError(f"{file}: the numbers of units differ from support_sizes in {CONFIG_NAME}")
    return deltas, others


def _require_expected(key: str, tensor: Tensor, config: FGGMConfig, file: Path) -> None:
    """Raise for a tensor that is neither part of a delta nor one that PEFT adds to a file."""
    saved_whole = any(f".{name}." in f".{key}" for name in config.modules_to_save or [])  # ends of module paths
    is_bias = config.bias == "all" and key.endswith(".bias")
    is_embedding = f".{key}".endswith(".weight")  # PEFT saves embeddings that are targeted or were resized
    if not (saved_whole or is_bias or is_embedding):
        raise AdapterFileError(f"{file}: unknown key {key}")
    if tensor.is_floating_point() and not all_finite(tensor):
        raise AdapterFileError(f"{file}: {key}: a value is NaN or infinite")


def find_adapter(adapter: str | Path, subfolder: str | None = None, **hub: Any) -> tuple[FGGMConfig, Path]:
    """The config of an adapter and the path of its file of tensors, which is downloaded if necessary."""
    config = read_config(_fetch(adapter, CONFIG_NAME, subfolder, hub))
    return config, _fetch(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder, hub)


def read_config(file: Path) -> FGGMConfig:
    """Read an ``adapter_config.json``; ``AdapterFileError`` if it is damaged, ``ValueError`` for another method."""
    settings = FGGMConfig.from_json_file(str(file))
    if settings.get("peft_type") != "FGGM":
        raise ValueError(f"{file.parent} is a {settings.get('peft_type')} adapter, not FGGM")
    try:
        return FGGMConfig(**settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{file}: {error}") from error


def _fetch(adapter: str | Path, name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    folder = user_path(adapter)
    if folder.is_dir():
        file = folder / (subfolder or "") / name
        if file.is_file():
            return file
        raise AdapterFileError(f"{str(adapter)!r} has no {name}. Adapters are only read from safetensors files.")
    with from_hub(str(adapter), "adapter", AdapterFileError):
        return Path(hf_hub_download(str(adapter), name, subfolder=subfolder, **hub))


def adapted_layers(model: nn.Module, shapes: Mapping[str, Shape], where: str = "") -> dict[str, FGGMLayer]:
    """The layers of a model by module path, as ``FGGMLayer``s; ``BaseMismatchError`` unless they have these shapes."""
    modules = {path_in_base(path): module for path, module in model.named_modules()}
    quantization = get_quantization_kwargs(model)
    layers = {}
    for path, shape in shapes.items():
        layer = adaptable_layer(modules.get(path), path, **quantization) or parameter_layer(modules, path)
        if layer is None or tuple(layer.weight_shape) != tuple(shape):
            actual = "not an adaptable layer" if layer is None else str(list(layer.weight_shape))
            where = f"{where}: " if where else ""
            raise BaseMismatchError(
                f"{where}the delta was made for another base: {path} is {actual} here, {list(shape)} in the delta"
            )
        layers[path] = layer
    return layers


def adaptable_layer(module: nn.Module | None, path: str, **quantization: Any) -> FGGMLayer | None:
    """A module as an ``FGGMLayer``; None if it cannot be adapted."""
    if module is None or isinstance(module, FGGMLayer):
        return module
    try:
        return make_layer(module, path, **quantization)
    except TypeError:
        return None
