"""Converts an adapter's tensors to those of a file, and writes adapters as a whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...core.errors import AdapterFileError
from ...core.granularity import Granularity, Shape
from ...core.index_codec import encode_indices
from ...core.ranking import all_finite
from ..config import FGGMConfig
from ..hosts.sharding import plain_name, state_prefix
from ..target import find_targets
from .atomic import complete_folder
from .base_check import base_difference, fingerprint
from .hub import user_path
from .tensors import MARK, PARTS


def save_adapter(model: Any, folder: str | Path, is_main_process: bool = True, **options: Any) -> None:
    """Like ``model.save_pretrained(folder)``, but the folder never contains a part of an adapter.

    PEFT writes each file in place, so a process that is killed leaves an incomplete file.

    Args:
        model: a ``PeftModel``.
        is_main_process: whether this process writes. Other processes only help to gather sharded tensors.
        options: arguments of ``PeftModel.save_pretrained``.
    """
    if not is_main_process:
        model.save_pretrained(str(folder), is_main_process=False, **options)
        return
    with complete_folder(Path(folder)) as temporary:
        keep_card(Path(folder), temporary)
        model.save_pretrained(str(temporary), **options)


def keep_card(folder: Path, temporary: Path) -> None:
    """Copy an existing model card to the temporary folder, where saving updates it; rename it if it is damaged."""
    card, name = user_path(folder) / "README.md", "README.md"
    if not card.is_file():
        return
    try:
        str(ModelCard.load(card))
    except Exception as error:  # the card may contain anything
        name, reason = "README.old.md", " ".join(str(error).split())
        warnings.warn(f"the card {card} cannot be updated and is renamed to {name}: {reason:.200}", stacklevel=3)
    shutil.copy(card, temporary / name)


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Save adapters in this context without rounding to ``delta_dtype``, so that training can resume exactly."""
    configs = [c for c in (getattr(model, "peft_config", None) or {}).values() if isinstance(c, FGGMConfig)]
    dtypes = [config.delta_dtype for config in configs]
    try:
        for config in configs:
            config.delta_dtype = None
        yield
    finally:
        for config, dtype in zip(configs, dtypes, strict=True):
            config.delta_dtype = dtype


def encode_for_file_(model: nn.Module, config: FGGMConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Convert the tensors of an adapter in a state dict to those of a file, in place, and complete the config."""
    targets, prefix = find_targets(model, adapter_name), state_prefix(model)
    keys = {plain_name(key): key for key in state_dict}
    encoded: dict[str, dict[str, Tensor]] = {}
    for path, target in targets.items():
        names = {part: f"{prefix}{path}{MARK}{part}.{adapter_name}" for part in PARTS}
        tensors = {part: state_dict[keys[names[part]]] for part in PARTS if names[part] in keys}
        if adapter_name in target.layer.fggm_indices.awaited:  # a loader never brought the support
            tensors = target.layer.empty_tensors(adapter_name)
        if tensors.keys() != set(PARTS) or any(isinstance(t, DTensor) or t.is_meta for t in tensors.values()):
            continue  # they are in other processes, or not in memory
        encoded[path] = encode(target.granularity, target.shape, config, tensors, path)
        for name in names.values():
            state_dict.pop(keys.get(name, ""), None)
        state_dict |= {names[part]: tensor for part, tensor in encoded[path].items()}
    layers, expected = {path: target.layer for path, target in targets.items()}, config.base_fingerprint or {}
    # an old fingerprint that fits is kept, because it may come from the unquantized base
    if encoded and (expected.keys() != layers.keys() or base_difference(layers, expected) is not None):
        expected = fingerprint(layers)
    is_selected = any(target.is_selected for target in targets.values())
    config.describe_file(
        base_fingerprint=expected or None,
        support_sizes={path: len(target.indices) for path, target in targets.items()} if is_selected else None,
        index_bytes=index_bytes(encoded) if is_selected else None,
    )


def index_bytes(encoded: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int] | None:
    """Module path -> size of the encoded indices; None if all indices are plain."""
    return {p: t["indices"].nbytes for p, t in encoded.items() if t["indices"].dtype == torch.uint8} or None


def encode(
    granularity: Granularity, shape: Shape, config: FGGMConfig, tensors: Mapping[str, Tensor], path: str
) -> dict[str, Tensor]:
    """Part -> tensor of one module, as a file contains them; ``AdapterFileError`` if a value is NaN or infinite."""
    values = tensors["values"]
    if config.delta_dtype is not None:
        values = values.to(getattr(torch, config.delta_dtype))
    if not all_finite(values):
        rounded = "" if config.delta_dtype is None else f" as {config.delta_dtype}"
        raise AdapterFileError(
            f"{path}: a number of its values is NaN or infinite{rounded}, so the adapter is not saved. Go back to an "
            "earlier checkpoint, or lower the learning rate."
        )
    indices = encode_indices(tensors["indices"], granularity.units(shape), granularity.compresses_indices)
    return {"values": values, "indices": indices}
