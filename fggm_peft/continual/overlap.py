"""How much the supports of a run's tasks overlap, from the deltas that the tasks have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..selection.protection import supports_in_file
from ..tuner.layer_types import make_layer

CONFIG = "adapter_config.json"


def support_overlap(model: nn.Module, folders: Sequence[Path]) -> dict[str, Any] | None:
    """Jaccard index of every two tasks' supports, ``|A and B| / |A or B|`` in weight entries.

    Args:
        model: the base, of which the modules' shapes are taken.
        folders: one for each task.

    Returns:
        ``{"jaccard": [[...]], "chance": [[...]]}``, ``[T, T]``; chance is ``e / (|A| + |B| - e)`` with ``e`` the
        expected intersection of random supports of the same sizes in each module. None if a task left no FGGM delta.
    """
    if not all(_is_fggm(folder) for folder in folders):
        return None
    supports = [dict(supports_in_file(model, str(folder))) for folder in folders]
    sizes = {
        name: (kind.units(shape := make_layer(model.get_submodule(name), name).weight_shape), shape, kind)
        for held in supports
        for name, (kind, _) in held.items()
    }
    pairs = [[_pair(a, b, sizes) for b in supports] for a in supports]
    return {
        "jaccard": [[_jaccard(both, total) for both, _, total in row] for row in pairs],
        "chance": [[_jaccard(expected, total) for _, expected, total in row] for row in pairs],
    }


def _is_fggm(folder: Path) -> bool:
    file = folder / CONFIG
    return file.is_file() and json.loads(file.read_text()).get("peft_type") == "FGGM"


def _pair(a: dict[str, Any], b: dict[str, Any], sizes: dict[str, Any]) -> tuple[float, float, float]:
    """Entries in both supports, how many would be by chance, and the sum of their sizes."""
    both = expected = total = 0.0
    for name, (units, shape, kind) in sizes.items():
        mine, theirs = (held[name][1] if name in held else torch.empty(0) for held in (a, b))
        cost = kind.parameters_per_unit(shape)
        both += cost * _common(mine, theirs, units)
        expected += cost * len(mine) * len(theirs) / units
        total += cost * (len(mine) + len(theirs))
    return both, expected, total


def _common(a: Tensor, b: Tensor, units: int) -> int:
    chosen = torch.zeros(units, dtype=torch.bool)
    chosen[a.long()] = True
    return int(chosen[b.long()].sum())


def _jaccard(both: float, total: float) -> float:
    return both / (total - both) if total > both else 0.0
