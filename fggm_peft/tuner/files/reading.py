"""The one way to read an adapter file outside of PEFT's loading: decoded, and checked before anything uses it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_quantization_kwargs
from torch import Tensor, nn

from ...core.errors import AdapterFileError
from ...core.fingerprint import sketches_from
from ...core.finite import all_finite
from ...core.granularity import Shape
from ..config import FGGMConfig
from ..hosts.sharding import path_in_base
from ..layer import FGGMLayer
from ..layer_types import make_layer
from .hub import from_hub
from .tensors import MARK, opened, read_modules

Delta = dict[str, Tensor]


def read_adapter(
    adapter: str | Path, model: nn.Module | None = None, **hub: Any
) -> tuple[FGGMConfig, dict[str, Delta]]:
    """An adapter's config and, for every module, its delta.

    Args:
        adapter: a folder, or a Hub id.
        model: the base, adapted or not. Needed if the values are absolute, or if an older version of the library has
            written the file, which does not say how large the weights are.
        hub: ``revision``, ``token``, ``subfolder`` and the like, for the Hub.

    Returns:
        The config, and module path -> ``{"indices": [k], "values": ..., "bias": [k]}``: indices as int32 (int64 in a
        weight of over 2**31 entries), sorted and unique; values as the granularity shapes them, in the dtype of the
        file; bias only where it is trained. On the CPU.

    Raises:
        AdapterFileError: a file is missing or damaged, or does not fit ``model``; names the file and the tensor.
        ValueError: it is an adapter of another method, or it needs ``model``.
    """
    contents = contents_of(*find_adapter(adapter, **hub))
    return contents.config, contents.deltas


@dataclass(frozen=True)
class AdapterContents:
    """All of an adapter, decoded and checked.

    Args:
        file: the file of tensors.
        deltas: module path -> ``indices``, ``values`` and perhaps ``bias``.
        shapes: module path -> ``(o, i)`` of the weight.
        dtypes: module path -> what the values have in the file.
        others: what else is in the file, by its key there: modules that are saved whole, biases, embeddings.
    """

    config: FGGMConfig
    file: Path
    deltas: dict[str, Delta]
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    others: dict[str, Tensor]


def contents_of(config: FGGMConfig, file: Path, model: nn.Module | None = None) -> AdapterContents:
    """All of the adapter that ``find_adapter`` has found, as ``read_adapter`` reads it."""
    with opened(file) as tensors:
        modules = read_modules(tensors, file)
        others = {key: tensors.get_tensor(key) for key in sorted(tensors.keys()) if MARK not in key}
    for key, tensor in others.items():
        _require_expected(key, tensor, config, file)
    layers = None if model is None else adapted_layers(model, modules, str(file.parent))
    shapes = _shapes(config, layers, modules, str(file.parent))
    granularity = config.granularity
    deltas = {name: stored.checked(granularity, shapes[name]) for name, stored in modules.items()}
    dtypes = {name: stored.tensors["values"].dtype for name, stored in modules.items()}
    return AdapterContents(config, file, deltas, shapes, dtypes, others)


def _require_expected(key: str, tensor: Tensor, config: FGGMConfig, file: Path) -> None:
    """Raise for a tensor that is no delta, unless PEFT may have put it there."""
    parts = key.split(".")
    saved_whole = any(f".{name}." in f".{key}" for name in config.modules_to_save or [])  # ends of modules' paths
    bias = config.bias == "all" and parts[-1] == "bias"
    embedding = parts[-1] == "weight"  # PEFT adds embeddings that are targeted or were resized
    if not (saved_whole or bias or embedding):
        raise AdapterFileError(f"{file}: unknown key {key}")
    if tensor.is_floating_point() and not all_finite(tensor):
        raise AdapterFileError(f"{file}: {key}: a value is NaN or infinite")


def read_supports(
    adapter: str | Path, model: nn.Module | None = None, **hub: Any
) -> tuple[FGGMConfig, dict[str, Tensor]]:
    """As ``read_adapter``, but of the values only the shapes are read: module path -> indices."""
    config, file = find_adapter(adapter, **hub)
    granularity = config.granularity
    with opened(file) as tensors:
        modules = read_modules(tensors, file, unread=("values", "bias"))
    layers = None if model is None else adapted_layers(model, modules, str(adapter))
    shapes = _shapes(config, layers, modules, str(adapter))
    return config, {name: stored.support(granularity, shapes[name]) for name, stored in modules.items()}


def find_adapter(adapter: str | Path, subfolder: str | None = None, **hub: Any) -> tuple[FGGMConfig, Path]:
    """The config of an adapter, and its file of tensors, downloaded if need be.

    Raises:
        AdapterFileError: one is missing, or the config is damaged.
        ValueError: it is an adapter of another method.
    """
    config = read_config(_fetched(adapter, CONFIG_NAME, subfolder, hub))
    return config, _fetched(adapter, SAFETENSORS_WEIGHTS_NAME, subfolder, hub)


def read_config(file: Path) -> FGGMConfig:
    """The config in an ``adapter_config.json``.

    Raises:
        AdapterFileError: it is damaged; names the file.
        ValueError: it is that of another method.
    """
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise AdapterFileError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise AdapterFileError(f"{file} is not the config of an adapter")
    if settings["peft_type"] != "FGGM":
        raise ValueError(f"{file.parent} is a {settings['peft_type']} adapter, not FGGM")
    try:
        config = PeftConfig.from_peft_type(**settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterFileError(f"{file}: {error}") from error
    assert isinstance(config, FGGMConfig)
    return config


def _fetched(adapter: str | Path, name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        file = folder / (subfolder or "") / name
        if file.is_file():
            return file
        raise AdapterFileError(f"{str(adapter)!r} has no {name}. Adapters are read from safetensors alone.")
    with from_hub(str(adapter), "adapter", AdapterFileError):
        return Path(hf_hub_download(str(adapter), name, subfolder=subfolder, **hub))


def adapted_layers(model: nn.Module, names: Iterable[str], where: str) -> dict[str, FGGMLayer]:
    """The layers that an adapter adapts, by module path."""
    modules, quantization = module_paths(model), get_quantization_kwargs(model)
    return {name: weight_layer(modules, name, where, **quantization) for name in names}


def _shapes(
    config: FGGMConfig, layers: Mapping[str, FGGMLayer] | None, names: Iterable[str], where: str
) -> dict[str, Shape]:
    """Module path -> ``(o, i)``: of the model's layers if they are known, else as the config says."""
    if layers is not None:
        return {name: layers[name].weight_shape for name in names}
    kept = sketches_from(config.base_fingerprint or {})
    if missing := [name for name in names if name not in kept]:
        raise AdapterFileError(
            f"{where}: the config does not say what shape {missing[0]} has, as files of older versions do not. Read it "
            "with its base: model=..."
        )
    return {name: kept[name].shape for name in names}


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Module path within the base model -> module, whatever is wrapped around the base."""
    return {path_in_base(path): module for path, module in model.named_modules()}


def weight_layer(modules: Mapping[str, nn.Module], name: str, where: str, **quantization: Any) -> FGGMLayer:
    """The layer that an adapter adapts, or would adapt, at a path.

    Raises:
        AdapterFileError: the model has no such module, or one that cannot be adapted.
    """
    module = modules.get(name)
    try:
        if module is not None:
            return module if isinstance(module, FGGMLayer) else make_layer(module, name, **quantization)
    except TypeError:
        pass
    what = "no module" if module is None else "no layer with a weight"
    raise AdapterFileError(f"{where}: {name} is {what} of this model. The delta was made for another base model.")
