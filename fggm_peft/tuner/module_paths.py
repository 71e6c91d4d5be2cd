"""Where modules sit, by their paths alone: in which layer, and of what type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NO_LAYER = ""
GROUPS = 4
"""How many groups of layers a coarse grid has at most."""


@dataclass(frozen=True)
class Place:
    """Of one module.

    Args:
        stack: what stands before the number of its layer, such as "model.layers"; empty for a module without one.
        layer: that number; None without one.
        kind: the rest of its path, with ``*`` for further numbers, such as those of experts.
    """

    stack: str
    layer: int | None
    kind: str


def place_of(name: str) -> Place:
    """The place of a module path; the first number in it is taken for the layer's."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return Place("", None, name)
    kind = ".".join("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return Place(".".join(parts[:number]), int(parts[number]), kind or "*")


@dataclass(frozen=True)
class Grid:
    """Shares of weights by type and layer.

    Args:
        kinds: names of the types, each as short as tells it from the others.
        layers: names of the layers: their numbers, with the stack before them where there are several.
        values: ``[kinds][layers]`` in [0, 1]; None where a layer has no module of the type.
    """

    kinds: list[str]
    layers: list[str]
    values: list[list[float | None]]

    @property
    def is_even(self) -> bool:
        """Whether all shares are the same, but for rounding to whole units."""
        known = [value for row in self.values for value in row if value is not None]
        return max(known) - min(known) <= 0.02 * max(known)

    def to_dict(self) -> dict[str, Any]:
        """For a config: ``{"layers": [...], kind: [...], ...}``."""
        rounded = [[value if value is None else round(value, 6) for value in row] for row in self.values]
        return {"layers": self.layers, **dict(zip(self.kinds, rounded, strict=True))}


def grid_from_dict(data: Any) -> Grid | None:
    """What ``to_dict`` gave; None for anything else, since a config may come from a stranger."""
    if not isinstance(data, dict) or not isinstance(layers := data.get("layers"), list) or len(data) < 2:
        return None
    rows = {str(kind): row for kind, row in data.items() if kind != "layers"}
    values = [value for row in rows.values() for value in (row if isinstance(row, list) else [row])]
    shares = [value for value in values if value is not None]
    is_whole = all(isinstance(row, list) and len(row) == len(layers) for row in rows.values())
    if not is_whole or not shares or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in shares):
        return None
    return Grid(list(rows), list(map(str, layers)), list(rows.values()))


def density_grid(shares: Mapping[str, tuple[float, int]], groups: int | None = None) -> Grid:
    """What share of the weights may move, by type and layer.

    Modules of one type in one layer are taken together, and so are layers of one group.

    Args:
        shares: module path -> share that may move, entries of the weight.
        groups: put the layers of each stack into so many groups at most; None for none.
    """
    places = {name: place_of(name) for name in shares}
    kinds = list(dict.fromkeys(place.kind for place in places.values()))
    column_of = _columns(places.values(), groups)
    columns = list(dict.fromkeys(column_of.values()))
    moving, total = ({(k, c): 0.0 for k in kinds for c in columns} for _ in range(2))
    for name, (share, entries) in shares.items():
        place = places[name]
        cell = place.kind, column_of[place.stack, place.layer]
        moving[cell], total[cell] = moving[cell] + share * entries, total[cell] + entries
    values = [[moving[k, c] / total[k, c] if total[k, c] else None for c in columns] for k in kinds]
    return Grid(_short(kinds), columns, values)


def _columns(places: Iterable[Place], groups: int | None) -> dict[tuple[str, int | None], str]:
    """(stack, layer) -> name of the column, in order."""
    layers: dict[str, set[int]] = {}
    has_others = False
    for place in places:
        if place.layer is None:
            has_others = True
        else:
            layers.setdefault(place.stack, set()).add(place.layer)
    stacks = dict(zip(layers, _short(list(layers), from_front=True), strict=True)) if len(layers) > 1 else {}
    found: dict[tuple[str, int | None], str] = {}
    for stack, numbers in layers.items():
        prefix = f"{stacks[stack]} " if stacks else ""
        for part in _parts(sorted(numbers), groups):
            text = str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}"
            found |= {(stack, number): prefix + text for number in part}
    if has_others:
        found["", None] = NO_LAYER
    return found


def _parts(numbers: Sequence[int], groups: int | None) -> list[Sequence[int]]:
    """The numbers in at most so many groups of nearly the same size."""
    count = len(numbers) if groups is None else min(groups, len(numbers))
    edges = [len(numbers) * part // count for part in range(count + 1)]
    return [numbers[start:end] for start, end in pairwise(edges)]


def _short(names: list[str], from_front: bool = False) -> list[str]:
    """Each name's last parts (or first, for stacks), as few as tell it from the others."""
    found = []
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            cut = (lambda p, n=count: p[:n]) if from_front else (lambda p, n=count: p[-n:])
            if sum(cut(other.split(".")) == cut(parts) for other in names) == 1:
                break
        found.append(".".join(cut(parts)))
    return found


def markdown_table(grid: Grid) -> str:
    """The grid for a page without pictures: types down, layers across, shares in percent."""
    heads = [f"layers {name}" if "–" in name else f"layer {name}" if name else "no layer" for name in grid.layers]
    lines = ["| | " + " | ".join(map(_cell, heads)) + " |", "|---" * (len(heads) + 1) + "|"]
    for kind, row in zip(grid.kinds, grid.values, strict=True):
        cells = ["" if value is None else f"{100 * value:.3g} %" for value in row]
        lines.append(f"| {_cell(kind)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "").split())
