"""Sparse weight patches for vLLM: the entries that an adapter changes, with their new values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..deltas import SparseDelta
from ..deltas.apply import layers_to_change
from ..deltas.difference import weight_name
from ..tuner.merging.merge import add_to_dense_

MAX_ENTRIES = 2**31


@dataclass(frozen=True, eq=False)
class SparsePatch:
    """New values of one weight, with the fields of vLLM's ``SparseWeightPatch``.

    Attributes:
        name: of the weight in the base's state dict, which is its name in the checkpoint.
        indices: ``(k,)``, int32; ascending flat indices in the weight.
        values: ``(k,)``, in the weight's dtype; they replace the entries.
        full_shape: the shape of the weight.
    """

    name: str
    indices: Tensor
    values: Tensor
    full_shape: tuple[int, ...]


def sparse_patches(adapter: Any, base: nn.Module) -> Iterator[SparsePatch]:
    """The entries that differ between the base model and the merged model, bit for bit, for one weight at a time.

    Args:
        adapter: what ``SparseDelta.read`` accepts.
        base: the dense base model, without adapters. It is not changed.

    Raises:
        ValueError: the delta has whole tensors (``modules_to_save``, biases), was made for another base or is not
            finite, or a weight is quantized or has more than 2³¹ entries.
    """
    delta = SparseDelta.read(adapter)
    if whole := delta.whole_tensors:
        raise ValueError(f"the delta has whole tensors ({whole[0]}, ...), which are not sparse")
    layers = layers_to_change(base, [delta])
    weights: dict[str, Tensor] = base.state_dict()
    paths: dict[str, list[str]] = {}  # experts share a tensor
    for path, layer in layers.items():
        name = weight_name(path, layer)
        if layer.quantization_backend is not None or weights[name].numel() > MAX_ENTRIES:
            raise ValueError(f"{name} is quantized or has more than 2³¹ entries, so it has no sparse patch")
        paths.setdefault(name, []).append(path)
    for name, parts in paths.items():
        before = weights[name]
        after = before.clone(memory_format=torch.contiguous_format)
        for path in parts:
            add_to_dense_(layers[path].part(after), delta.modules[path].to(after.device))
        indices = (_bits(after) != _bits(before)).nonzero().squeeze(1)
        yield SparsePatch(name, indices.to(torch.int32), after.flatten()[indices], tuple(before.shape))


def _bits(weight: Tensor) -> Tensor:
    """The entries as integers, flat. Floating-point numbers would compare -0 and 0 as equal."""
    return weight.flatten().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
