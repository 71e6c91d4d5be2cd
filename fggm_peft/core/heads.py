"""``Heads``: attention heads as units, the same heads in every projection of an attention."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .blocks import ColumnBlocks, RowBlocks
from .granularity import GRANULARITIES, Granularity, UnitKind

_PROJECTION = re.compile(r"(?:(?P<q>q|query)|(?P<k>k|key)|(?P<v>v|value)|(?P<o>o|out|dense))(?:_proj|_lin)?")
"""The names of the layers of an attention, such as ``q_proj``."""
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""The attributes in which transformers' attentions store the number of features of a head."""


@GRANULARITIES.register("heads")
@dataclass(frozen=True)
class Heads(UnitKind):
    """Attention heads: a key/value head with the query heads that use it, and their part of the output layer.

    A head is a block of rows of the query, key and value layers, and a block of columns of the output layer. Its score
    is the sum over the targeted layers of its attention, which select the same heads.

    Args:
        kv_heads: number of key/value heads of each attention; None: that of the model, when the adapter is added.
    """

    kv_heads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_heads is not None and (type(self.kv_heads) is not int or self.kv_heads < 1):
            raise ValueError(f"Heads.kv_heads must be an integer > 0 or None, got {self.kv_heads!r}")

    def of_model(self, model: nn.Module, path: str) -> Heads:
        """The same with the number of heads: output features of the key layer, by the features of a head.

        Raises:
            ValueError: the module belongs to no attention with separate projections, or its attention has another
                number of heads.
        """
        attention = model.get_submodule(self.group_of(path))
        matches = {name: _PROJECTION.fullmatch(name) for name, _ in attention.named_children()}
        layers = {match.lastgroup: attention.get_submodule(name) for name, match in matches.items() if match}
        if not {"q", "k", "v"} <= layers.keys():
            raise _no_projection(path)
        key: Any = layers["k"]
        while hasattr(key, "base_layer"):
            key = key.base_layer
        size = next((size for name in _HEAD_SIZES if isinstance(size := getattr(attention, name, None), int)), 0)
        number, rest = divmod(getattr(key, "out_features", 0), max(1, size))
        if not size or not number or rest:
            return self
        if self.kv_heads not in (None, number):
            raise ValueError(
                f"{path}: its attention has {number} key/value heads, but granularity='{self}'. Attentions with "
                "different numbers of heads require adapters of their own; leave the others out with `exclude_modules`."
            )
        return replace(self, kv_heads=number)

    def of_weight(self, path: str, shape: tuple[int, int]) -> Granularity:
        match = _PROJECTION.fullmatch(path.rpartition(".")[2])
        if match is None:
            raise _no_projection(path)
        if self.kv_heads is None:
            raise ValueError(f"{path}: the number of key/value heads is unknown; give granularity=Heads(kv_heads=...)")
        is_output = match["o"] is not None
        size, rest = divmod(shape[is_output], self.kv_heads)
        if rest or not size:
            raise ValueError(f"{path}: granularity='{self}' does not support a weight of shape {list(shape)}")
        return ColumnBlocks(size) if is_output else RowBlocks(size)

    def group_of(self, path: str) -> str:
        return path.rpartition(".")[0]


def _no_projection(path: str) -> ValueError:
    """The error for a layer that has no heads."""
    return ValueError(
        f"{path} is not a projection of an attention with separate query, key and value layers, which "
        "granularity='heads' requires. Set target_modules to such layers, for example ['q_proj', 'k_proj', 'v_proj', "
        "'o_proj'], or use another granularity."
    )
