"""Derives a module's layer and type from its path, and tabulates densities by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
        layers: numbers of the layers, after the name of the stack if there are several stacks; "" for no layer.
        values: ``[kinds][layers]`` in [0, 1]; None if a layer has no module of the type.
    """

    kinds: list[str]
    layers: list[str]
    values: list[list[float | None]]


def density_grid(shares: Mapping[str, tuple[float, int]]) -> Grid:
    """Tabulate densities by type and layer. Modules of one cell are averaged by their sizes.

    Args:
        shares: module path -> density, number of entries of the weight.
    """
    parsed = {path: parse_path(path) for path in shares}
    kinds = list(dict.fromkeys(path.kind for path in parsed.values()))
    stacks = list(dict.fromkeys(path.stack for path in parsed.values() if path.layer is not None))
    # stack by stack, layers in order, and modules without a layer at the end
    numbered = sorted({(stacks.index(p.stack), p.layer) for p in parsed.values() if p.layer is not None})
    columns: list[tuple[str, int | None]] = [(stacks[stack], layer) for stack, layer in numbered]
    columns += [("", None)] if any(path.layer is None for path in parsed.values()) else []
    selected, total = ({(kind, column): 0.0 for kind in kinds for column in columns} for _ in range(2))
    for path, (density, entries) in shares.items():
        cell = parsed[path].kind, (parsed[path].stack, parsed[path].layer)
        selected[cell], total[cell] = selected[cell] + density * entries, total[cell] + entries
    values = [[selected[k, c] / total[k, c] if total[k, c] else None for c in columns] for k in kinds]
    names = dict(zip(stacks, _shortened(stacks, from_front=True), strict=True)) if len(stacks) > 1 else {}
    layers = ["" if layer is None else f"{names.get(stack, '')} {layer}".strip() for stack, layer in columns]
    return Grid(_shortened(kinds), layers, values)


def _shortened(names: list[str], from_front: bool = False) -> list[str]:
    """The last (or first) parts of each name, as few as distinguish it from the others."""

    def cut(name: str, count: int) -> str:
        parts = name.split(".")
        return ".".join(parts[:count] if from_front else parts[-count:])

    def shortest(name: str) -> str:
        counts = range(1, name.count(".") + 1)
        return next((cut(name, n) for n in counts if sum(cut(other, n) == cut(name, n) for other in names) == 1), name)

    return [shortest(name) for name in names]
