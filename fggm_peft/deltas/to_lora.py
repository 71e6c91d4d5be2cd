"""Exports deltas as LoRA adapters of PEFT, exactly, for software that does not know this library.

A delta of k rows is a LoRA of rank k: A contains the rows, and B is one-hot. A delta of k columns is the transpose.
Single elements need as many ranks as there are rows or columns that contain them, whichever are fewer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..tuner.files.tensors import PREFIX
from ..tuner.layer import FGGMLayer
from ..tuner.layer_types import FGGMConv, FGGMEmbedding
from .apply import require_finite
from .base_model import Base
from .delta import ModuleDelta, SparseDelta
from .parameters_to_lora import ParameterExport
from .peft_adapter import layers_of, write_adapter


def export_lora(
    adapter: Any,
    output: str | Path,
    base: Base | None = None,
    max_rank: int | None = None,
    equal_ranks: bool = False,
) -> dict[str, int]:
    """Write a delta as a LoRA adapter that PEFT loads without this library. It is exact and has a scale of 1.

    Args:
        adapter: what ``SparseDelta.read`` accepts.
        output: the folder; its other files stay.
        base: the base model, or its folder or Hub id, for the types of its layers. By default the one that the
            adapter's config names. Not needed for a ``PeftModel``.
        max_rank: the largest rank that the server accepts; a warning names the modules that exceed it.
        equal_ranks: fill the factors of every module with zeros up to the largest rank, for engines that ignore
            ``rank_pattern`` and ``alpha_pattern``, such as llama.cpp.

    Returns:
        Module path, or key of a parameter -> rank. Modules with a delta of zero are left out. An engine has to accept
        the largest rank.

    Raises:
        ValueError: the delta is zero, or needs a convolution that LoRA does not
            support: with groups, dilation or a padding mode. Also for ``nn.MultiheadAttention``.
    """
    delta = SparseDelta.read(adapter)
    layers = layers_of(adapter, delta, base)
    ranks: dict[str, int] = {}
    parameters: dict[str, ParameterExport] = {}
    tensors: dict[str, Tensor] = {}
    required = {path: required_rank(module) for path, module in delta.modules.items()}
    for path, module in delta.modules.items():
        require_finite(path, module)
        if not required[path]:
            continue
        rank = max(required.values()) if equal_ranks else required[path]
        _require_supported(path, layers[path])
        factors = _factors(module, rank)
        if layers[path].reads_inputs:
            ranks[path] = rank
            tensors |= _lora_tensors(PREFIX + path, layers[path], *factors)
        else:
            ParameterExport.add_(parameters, path, layers[path], factors)
    for export in parameters.values():
        ranks |= export.ranks()
        tensors |= export.tensors()
    if not ranks:
        raise ValueError("the delta is zero everywhere: there is nothing to export")
    keys = [key for export in parameters.values() for key in export.ranks()]
    write_adapter(output, delta, tensors, LoraConfig, **_settings(delta, ranks, layers, keys))
    if max_rank is not None and max(ranks.values()) > max_rank:
        path = max(ranks, key=ranks.__getitem__)
        warnings.warn(
            f"{sum(rank > max_rank for rank in ranks.values())} modules have a rank above {max_rank}, the most "
            f"{ranks[path]} in {path}. Raise the maximum rank of the server, train rows or columns with "
            f"max_units={max_rank}, or approximate with PEFT: convert_to_lora(model, rank={max_rank})",
            stacklevel=2,
        )
    return ranks


def required_rank(module: ModuleDelta) -> int:
    """Rank of the exact LoRA: the number of rows or columns that the delta changes, whichever are fewer."""
    return min(len(lines) for lines in _changed_lines(module))


def _require_supported(path: str, layer: FGGMLayer) -> None:
    """Raise ``ValueError`` if PEFT's LoRA of this layer cannot express the delta."""
    base: Any = layer.get_base_layer()
    if isinstance(getattr(base, "module", None), nn.MultiheadAttention):
        raise ValueError(
            f"{path} belongs to nn.MultiheadAttention, whose LoRA adds the delta of out_proj twice in PEFT 0.21 "
            "(huggingface/peft#3774). Leave it out of the delta, or merge the delta into the base (fggm merge)"
        )
    if not isinstance(layer, FGGMConv):
        return
    is_plain = {"groups": base.groups == 1, "dilation": set(base.dilation) == {1}}
    is_plain["padding_mode"] = base.padding_mode == "zeros"
    if unsupported := next((setting for setting, plain in is_plain.items() if not plain), None):
        raise ValueError(
            f"{path} is a convolution with {unsupported}={getattr(base, unsupported)!r}, which PEFT's LoRA ignores. "
            "Leave it out of the delta, or merge the delta into the base (fggm merge)"
        )


def _changed_lines(module: ModuleDelta) -> list[Tensor]:
    """The sorted indices of the rows and of the columns that are not zero."""
    elements = module.as_elements(module.shape)
    changed = elements.indices[elements.values != 0]
    return [(changed // module.shape[1]).unique().long(), (changed % module.shape[1]).unique().long()]


def _factors(module: ModuleDelta, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` ``[rank, i]`` and ``B`` ``[o, rank]`` with ``B @ A`` equal to the delta."""
    matrix = torch.zeros(module.shape, dtype=torch.promote_types(module.values.dtype, torch.float32))
    module.granularity.add_(matrix, module.indices, module.values)
    rows, columns = _changed_lines(module)
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    if len(rows) <= len(columns):
        a[: len(rows)] = matrix[rows]
        b[rows, torch.arange(len(rows))] = 1
    else:
        a[torch.arange(len(columns)), columns] = 1
        b[:, : len(columns)] = matrix[:, columns]
    return a, b


def _lora_tensors(prefix: str, layer: FGGMLayer, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The factors with PEFT's names and shapes for this type of layer."""
    if isinstance(layer, FGGMEmbedding):  # its weight is [tokens, features], and LoRA's delta is (B A)^T
        return {f"{prefix}.lora_embedding_A": b.mT, f"{prefix}.lora_embedding_B": a.mT}
    if isinstance(layer, FGGMConv):
        base: Any = layer.get_base_layer()
        kernel = base.weight.shape[2:]
        a, b = a.view(len(a), -1, *kernel), b.view(*b.shape, *[1] * len(kernel))
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _settings(
    delta: SparseDelta, ranks: Mapping[str, int], layers: Mapping[str, FGGMLayer], parameters: list[str]
) -> dict[str, Any]:
    """Fields of a config with a scale of 1: alpha equals the rank in every module. ``r`` is the largest rank."""
    # the longest path first, because PEFT uses the first pattern that matches the end of a path
    paths, largest = sorted(ranks, key=len, reverse=True), max(ranks.values())
    pattern = {path: ranks[path] for path in paths if ranks[path] != largest}
    transposed = Counter(bool(getattr(layers[path], "is_transposed", False)) for path in paths if path in layers)
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": dict(pattern),
        "alpha_pattern": dict(pattern),
        "target_modules": [path for path in ranks if path not in parameters],
        "target_parameters": parameters or None,
        "bias": delta.config.bias,
        "fan_in_fan_out": transposed[True] > transposed[False],
    }
