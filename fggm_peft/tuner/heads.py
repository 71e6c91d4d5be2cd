"""Reads the number of attention heads from a model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..core.heads import PROJECTION, Heads, no_projection

_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""The attributes in which transformers' attentions store the number of features of a head."""


def with_number_of_heads(heads: Heads, model: nn.Module, path: str) -> Heads:
    """``heads`` with the number of key/value heads of the attention that contains the layer at ``path``.

    The number is that of the key layer's output features divided by the size of a head, which the attention knows.

    Raises:
        ValueError: the layer belongs to no attention with separate projections, or ``heads`` has another number.
    """
    attention = model.get_submodule(heads.group_of(path))
    matches = {name: PROJECTION.fullmatch(name) for name, _ in attention.named_children()}
    layers = {match.lastgroup: attention.get_submodule(name) for name, match in matches.items() if match}
    if not {"q", "k", "v"} <= layers.keys():
        raise no_projection(path)
    key = layers["k"]
    while hasattr(key, "base_layer"):
        key = key.base_layer
    size = next((size for name in _HEAD_SIZES if isinstance(size := getattr(attention, name, None), int)), 0)
    number, rest = divmod(getattr(key, "out_features", 0), max(1, size))
    if not size or not number or rest:
        return heads
    if heads.kv_heads not in (None, number):
        raise ValueError(
            f"{path}: its attention has {number} key/value heads, but granularity='{heads}'. Attentions with different "
            "numbers of heads require adapters of their own; leave the others out with `exclude_modules`."
        )
    return replace(heads, kv_heads=number)
