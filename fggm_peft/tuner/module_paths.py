"""Derives a module's layer and type from its path, and tabulates densities by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NO_LAYER = ""
GROUPS = 4
"""Maximum number of groups of layers in a coarse grid."""


@dataclass(frozen=True)
class ParsedPath:
    """The parts of a module path.

    Args:
        stack: path before the layer's number, such as "model.layers"; empty if there is no number.
        layer: the layer's number, or None.
        kind: the rest of the path, with ``*`` for further numbers, such as those of experts.
    """

    stack: str
    layer: int | None
    kind: str


def parse_path(path: str) -> ParsedPath:
    """Split a module path at its first number, which is the layer's."""
    parts = path.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        return ParsedPath("", None, path)
    kind = ".".join("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return ParsedPath(".".join(parts[:number]), int(parts[number]), kind or "*")


@dataclass(frozen=True)
class Grid:
    """Densities by module type and layer.

    Args:
        kinds: names of the types, as short as distinguishes them.
        layers: numbers of the layers, after the name of the stack if there are several stacks.
        values: ``[kinds][layers]`` in [0, 1]; None if a layer has no module of the type.
    """

    kinds: list[str]
    layers: list[str]
    values: list[list[float | None]]

    @property
    def is_even(self) -> bool:
        """Whether all densities are equal, except for rounding to whole units."""
        densities = [value for row in self.values for value in row if value is not None]
        return max(densities) - min(densities) <= 0.02 * max(densities)

    def to_dict(self) -> dict[str, Any]:
        """For a config: ``{"layers": [...], kind: [...], ...}``."""
        rounded = [[value if value is None else round(value, 6) for value in row] for row in self.values]
        return {"layers": self.layers, **dict(zip(self.kinds, rounded, strict=True))}


def grid_from_dict(data: Any) -> Grid | None:
    """The inverse of ``to_dict``; None for anything else, because a config may come from a stranger."""
    if not isinstance(data, dict) or not isinstance(layers := data.get("layers"), list) or len(data) < 2:
        return None
    rows = {str(kind): row for kind, row in data.items() if kind != "layers"}
    if not all(isinstance(row, list) and len(row) == len(layers) for row in rows.values()):
        return None
    densities = [value for row in rows.values() for value in row if value is not None]
    if not densities or not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in densities):
        return None
    return Grid(list(rows), list(map(str, layers)), list(rows.values()))


def density_grid(shares: Mapping[str, tuple[float, int]], groups: int | None = None) -> Grid:
    """Tabulate densities by type and layer. Modules of one cell are averaged by their sizes.

    Args:
        shares: module path -> density, number of entries of the weight.
        groups: combine the layers of each stack into at most this number of groups.
    """
    parsed = {path: parse_path(path) for path in shares}
    kinds = list(dict.fromkeys(path.kind for path in parsed.values()))
    column_of = _columns(list(parsed.values()), groups)
    columns = list(dict.fromkeys(column_of.values()))
    selected, total = ({(kind, column): 0.0 for kind in kinds for column in columns} for _ in range(2))
    for path, (density, entries) in shares.items():
        cell = parsed[path].kind, column_of[parsed[path].stack, parsed[path].layer]
        selected[cell], total[cell] = selected[cell] + density * entries, total[cell] + entries
    values = [[selected[k, c] / total[k, c] if total[k, c] else None for c in columns] for k in kinds]
    return Grid(_shortened(kinds), columns, values)


def _columns(paths: Sequence[ParsedPath], groups: int | None) -> dict[tuple[str, int | None], str]:
    """(stack, layer) -> name of the column, in order."""
    stacks: dict[str, set[int]] = {}
    for path in paths:
        if path.layer is not None:
            stacks.setdefault(path.stack, set()).add(path.layer)
    prefixes = dict(zip(stacks, _shortened(list(stacks), from_front=True), strict=True)) if len(stacks) > 1 else {}
    columns: dict[tuple[str, int | None], str] = {}
    for stack, layers in stacks.items():
        prefix = f"{prefixes[stack]} " if prefixes else ""
        for group in _split(sorted(layers), groups):
            text = str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"
            columns |= {(stack, layer): prefix + text for layer in group}
    if any(path.layer is None for path in paths):
        columns["", None] = NO_LAYER
    return columns


def _split(numbers: Sequence[int], groups: int | None) -> list[Sequence[int]]:
    """Split the numbers into at most ``groups`` groups of nearly equal size."""
    count = len(numbers) if groups is None else min(groups, len(numbers))
    edges = [len(numbers) * part // count for part in range(count + 1)]
    return [numbers[start:end] for start, end in pairwise(edges)]


def _shortened(names: list[str], from_front: bool = False) -> list[str]:
    """The last (or first) parts of each name, as few as distinguish it from the others."""

    def cut(name: str, count: int) -> str:
        parts = name.split(".")
        return ".".join(parts[:count] if from_front else parts[-count:])

    def shortest(name: str) -> str:
        counts = range(1, name.count(".") + 1)
        return next((cut(name, n) for n in counts if sum(cut(other, n) == cut(name, n) for other in names) == 1), name)

    return [shortest(name) for name in names]


def markdown_table(grid: Grid) -> str:
    """The grid as a Markdown table: types down, layers across, densities in percent."""
    headings = [f"layers {name}" if "–" in name else f"layer {name}" if name else "no layer" for name in grid.layers]
    lines = ["| | " + " | ".join(map(_cell, headings)) + " |", "|---" * (len(headings) + 1) + "|"]
    for kind, row in zip(grid.kinds, grid.values, strict=True):
        cells = ["" if value is None else f"{100 * value:.3g} %" for value in row]
        lines.append(f"| {_cell(kind)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "").split())
