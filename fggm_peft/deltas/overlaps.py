"""How much deltas share: the Jaccard index of their supports, and whether they move shared entries the same way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.granularity import Granularity, Shape
from ..core.weight_delta import WeightDelta, as_elements, restricted, shared
from ..selection.protection import Support, supports_in_file
from .delta import ModuleDelta, SparseDelta
from .meta_base import Base, weight_shapes

if TYPE_CHECKING:
    from rich.table import Table

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Shared:
    """What two deltas have in common in some weights; sums that add up over weights.

    Args:
        both: entries in both supports.
        expected: entries that random supports of the same sizes would share on average.
        total: entries of the one plus entries of the other.
        product: inner product of the values on the entries in both.
        square_a, square_b: squared norms of either's values there.
    """

    both: float = 0.0
    expected: float = 0.0
    total: float = 0.0
    product: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    def __add__(self, other: Shared) -> Shared:
        return Shared(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def jaccard(self) -> float:
        """``|A and B| / |A or B|``, in entries; 0 where both are empty."""
        return _jaccard(self.both, self.total)

    @property
    def chance(self) -> float:
        """``e / (|A| + |B| - e)`` with ``e`` what random supports would share on average."""
        return _jaccard(self.expected, self.total)

    @property
    def cosine(self) -> float | None:
        """Of the values on the shared entries; None where they share none, or one of them is zero there."""
        norm = (self.square_a * self.square_b) ** 0.5
        return self.product / norm if norm else None

    def to_dict(self) -> dict[str, Any]:
        return {"jaccard": self.jaccard, "chance": self.chance, "cosine": self.cosine, "shared_entries": self.both}


def _jaccard(both: float, total: float) -> float:
    return both / (total - both) if total > both else 0.0


@dataclass(frozen=True)
class Overlap:
    """What every two of several deltas share.

    Args:
        names: of the deltas.
        modules: module path -> ``[T][T]``.
    """

    names: list[str]
    modules: Mapping[str, Sequence[Sequence[Shared]]]

    @cached_property
    def total(self) -> list[list[Shared]]:
        """Over all modules, ``[T][T]``."""
        count = range(len(self.names))
        return [[sum((pairs[a][b] for pairs in self.modules.values()), Shared()) for b in count] for a in count]

    def matrix(self, measure: str) -> list[list[float | None]]:
        """``[T][T]`` of "jaccard", "chance" or "cosine" over all modules."""
        return [[getattr(pair, measure) for pair in row] for row in self.total]

    def to_dict(self) -> dict[str, Any]:
        """Plain types: the matrices over all modules, and every pair in every module."""
        pairs = [(a, b) for a in range(len(self.names)) for b in range(a)]
        return {
            "names": self.names,
            **{measure: self.matrix(measure) for measure in ("jaccard", "chance", "cosine")},
            "modules": {
                module: [{"a": self.names[b], "b": self.names[a], **found[b][a].to_dict()} for a, b in pairs]
                for module, found in self.modules.items()
            },
        }

    def table(self, by_module: bool = False) -> Table:
        """A row for each pair, and with ``by_module`` for each of its modules."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Overlap of the supports, in weight entries")
        for heading in ("deltas", *(["module"] if by_module else [])):
            table.add_column(heading, overflow="fold")
        for heading in ("Jaccard", "by chance", "shared", "cosine there"):
            table.add_column(heading, justify="right")
        total = self.total
        for b in range(len(self.names)):
            for a in range(b):
                lines = [("all", total[a][b])]
                if by_module:
                    lines += [(module, found[a][b]) for module, found in self.modules.items()]
                for module, pair in lines:
                    named = [Text(f"{self.names[a]}, {self.names[b]}"), *([Text(module)] if by_module else [])]
                    table.add_row(*named, *_cells(pair))
        return table

    def heat_map(self, file: str | Path) -> None:
        """Draw the Jaccard index below the diagonal and what chance gives above it; the suffix says as what.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..plots import overlap_plot, save

        save(overlap_plot(self.names, self.matrix("jaccard"), self.matrix("chance"), "Overlap"), file)

    def __str__(self) -> str:
        lines = [
            f"{self.names[a]}, {self.names[b]}: Jaccard {pair.jaccard:.3f}, by chance {pair.chance:.3f}"
            for b in range(len(self.names))
            for a in range(b)
            for pair in (self.total[a][b],)
        ]
        return "\n".join(lines)


def _cells(pair: Shared) -> list[str]:
    cosine = "" if pair.cosine is None else f"{pair.cosine:+.3f}"
    return [f"{pair.jaccard:.3f}", f"{pair.chance:.3f}", f"{int(pair.both):,}", cosine]


def overlap(*sources: Any, names: Sequence[str] | None = None, base: Base | None = None) -> Overlap:
    """What deltas of one base model share, module by module and in all.

    Args:
        sources: two or more of what ``SparseDelta.read`` takes.
        names: of the deltas; the names of their folders or their positions by default.
        base: see ``SparseDelta.read``.

    Raises:
        ValueError: they were made for different bases, or are fewer than two.
    """
    if len(sources) < 2:
        raise ValueError(f"an overlap is of two deltas or more, got {len(sources)}")
    if names is not None and len(names) != len(sources):
        raise ValueError(f"{len(sources)} deltas have {len(sources)} names, got {len(names)}")
    deltas = [SparseDelta.read(source, base) for source in sources]
    for delta in deltas[1:]:
        deltas[0].require_same_base(delta)
    paths = list(dict.fromkeys(path for delta in deltas for path in delta.modules))
    found: dict[str, list[list[Shared]]] = {}
    for path in paths:
        held = [delta.modules.get(path) for delta in deltas]
        found[path] = [[_of_values(a, b) for b in held] for a in held]
    labels = list(names) if names is not None else _labels(sources)
    return Overlap(labels, found)


def _labels(sources: Sequence[Any]) -> list[str]:
    """Folders by their names, or whole where two have one name; others by their position."""
    paths = [str(s) if isinstance(s, (str, Path)) else f"delta {n}" for n, s in enumerate(sources, 1)]
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _of_values(a: ModuleDelta | None, b: ModuleDelta | None) -> Shared:
    held = [module for module in (a, b) if module is not None]
    if a is None or b is None:
        return Shared(total=float(sum(module.values.numel() for module in held)))
    counts = _of_supports((a.granularity, a.indices), (b.granularity, b.indices), a.shape)
    first, second = a.scaled(), b.scaled()
    if a.granularity != b.granularity:
        first, second = as_elements(first, a.shape), as_elements(second, b.shape)
    in_a, in_b = shared(first.indices, second.indices)
    x, y = _values(first, in_a), _values(second, in_b)
    return counts + Shared(product=float(x @ y), square_a=float(x @ x), square_b=float(y @ y))


def _values(delta: WeightDelta, positions: Tensor) -> Tensor:
    return restricted(delta, positions).values.double().reshape(-1)


def _of_supports(a: Support | None, b: Support | None, shape: Shape) -> Shared:
    sizes = [0 if s is None else len(s[1]) * s[0].parameters_per_unit(shape) for s in (a, b)]
    both = 0 if a is None or b is None else _common(*a, *b, shape)
    return Shared(both, sizes[0] * sizes[1] / (shape[0] * shape[1]), float(sum(sizes)))


def _common(kind_a: Granularity, a: Tensor, kind_b: Granularity, b: Tensor, shape: Shape) -> int:
    """How many entries two supports share."""
    if kind_a == kind_b:
        return len(shared(a, b)[0]) * kind_a.parameters_per_unit(shape)
    return len(shared(kind_a.sorted_elements(a, shape)[0], kind_b.sorted_elements(b, shape)[0])[0])


def shared_entries(a: SparseDelta, b: SparseDelta) -> int:
    """How many weight entries both deltas may change."""
    pairs = [(a.modules[path], b.modules[path]) for path in a.modules.keys() & b.modules.keys()]
    return sum(_common(x.granularity, x.indices, y.granularity, y.indices, x.shape) for x, y in pairs)


def support_overlap(model: nn.Module, folders: Sequence[Path]) -> dict[str, Any] | None:
    """The Jaccard index of every two saved deltas' supports; of the values nothing is read.

    Args:
        model: the base, of which the modules' shapes are taken.
        folders: one for each delta.

    Returns:
        ``{"jaccard": [[...]], "chance": [[...]]}``, ``[T, T]``, over all modules. None if a folder holds no FGGM delta.
    """
    if not all(_is_fggm(folder) for folder in folders):
        return None
    supports = [dict(supports_in_file(model, str(folder))) for folder in folders]
    shapes = weight_shapes(model, dict.fromkeys(name for held in supports for name in held))
    found = {
        name: [[_of_supports(a.get(name), b.get(name), shape) for b in supports] for a in supports]
        for name, shape in shapes.items()
    }
    result = Overlap([folder.name for folder in folders], found)
    return {measure: result.matrix(measure) for measure in ("jaccard", "chance")}


def _is_fggm(folder: Path) -> bool:
    file = folder / CONFIG
    return file.is_file() and json.loads(file.read_text()).get("peft_type") == "FGGM"
