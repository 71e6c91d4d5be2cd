"""The overlap of deltas: the Jaccard index of their supports, and the cosine of their values on shared entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.weight_delta import in_one_granularity, shared
from .delta import ModuleDelta, SparseDelta

if TYPE_CHECKING:
    from rich.table import Table

MEASURES = ("jaccard", "chance", "cosine")


@dataclass(frozen=True)
class Shared:
    """The overlap of two deltas in some weights, as sums that add up over weights.

    Args:
        both: number of entries in both supports.
        expected: number of entries that random supports of the same sizes share on average.
        total: entries of the first support plus entries of the second.
        product: inner product of the values on the shared entries.
        square_a, square_b: squared norms of the values on the shared entries.
    """

    both: int = 0
    expected: float = 0.0
    total: int = 0
    product: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    def __add__(self, other: Shared) -> Shared:
        return Shared(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def jaccard(self) -> float:
        """``|A and B| / |A or B|`` in entries; 0 if both are empty."""
        return self.both / (self.total - self.both) if self.total else 0.0

    @property
    def chance(self) -> float:
        """The Jaccard index of random supports: ``e / (|A| + |B| - e)`` with ``e`` the expected shared entries."""
        return self.expected / (self.total - self.expected) if self.total else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine of the values on the shared entries; None if there are none, or one delta is zero there."""
        norm = (self.square_a * self.square_b) ** 0.5
        return self.product / norm if norm else None


@dataclass(frozen=True)
class Overlap:
    """The overlap of every pair of several deltas.

    Args:
        names: names of the deltas.
        modules: module path -> ``[T][T]``.
    """

    names: list[str]
    modules: Mapping[str, Sequence[Sequence[Shared]]]

    @cached_property
    def total(self) -> list[list[Shared]]:
        """The sum over all modules, ``[T][T]``."""
        count = range(len(self.names))
        return [[sum((pairs[a][b] for pairs in self.modules.values()), Shared()) for b in count] for a in count]

    def matrix(self, measure: str) -> list[list[float | None]]:
        """``[T][T]`` of "jaccard", "chance" or "cosine" over all modules."""
        return [[getattr(pair, measure) for pair in row] for row in self.total]

    def pairs(self) -> Iterator[tuple[str, str, str, Shared]]:
        """Two names, a module path or "all", and their overlap, for every pair."""
        for b, second in enumerate(self.names):
            for a, first in enumerate(self.names[:b]):
                yield first, second, "all", self.total[a][b]
                for path, rows in self.modules.items():
                    yield first, second, path, rows[a][b]

    def to_dict(self) -> dict[str, Any]:
        """Plain types: the matrices over all modules, and every pair in every module."""
        modules: dict[str, list[dict[str, Any]]] = {path: [] for path in self.modules}
        for first, second, path, pair in self.pairs():
            if path != "all":
                numbers = {measure: getattr(pair, measure) for measure in MEASURES}
                modules[path].append({"a": first, "b": second, **numbers, "shared_entries": pair.both})
        return {"names": self.names, **{measure: self.matrix(measure) for measure in MEASURES}, "modules": modules}

    def table(self, by_module: bool = False) -> Table:
        """A row for each pair and, with ``by_module``, for each of its modules."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Overlap of the supports, in weight entries")
        for heading in ("deltas", "module", "Jaccard", "by chance", "shared", "cosine there"):
            is_name = heading in ("deltas", "module")
            table.add_column(heading, justify="left" if is_name else "right", overflow="fold")
        for first, second, path, pair in self.pairs():
            if by_module or path == "all":
                cosine = "" if pair.cosine is None else f"{pair.cosine:+.3f}"
                numbers = [f"{pair.jaccard:.3f}", f"{pair.chance:.3f}", f"{pair.both:,}", cosine]
                table.add_row(Text(f"{first}, {second}"), Text(path), *numbers)
        return table

    def __str__(self) -> str:
        return "\n".join(
            f"{first}, {second}: Jaccard {pair.jaccard:.3f}, by chance {pair.chance:.3f}"
            for first, second, path, pair in self.pairs()
            if path == "all"
        )


def overlap(*sources: Any, names: Sequence[str] | None = None) -> Overlap:
    """Compare the supports and values of deltas of one base model, by module and in total.

    Args:
        sources: at least two of what ``SparseDelta.read`` accepts.
        names: names of the deltas; by default their folders' names or their positions.

    Raises:
        ValueError: the deltas were made for different bases, or there are fewer than two.
    """
    if len(sources) < 2:
        raise ValueError(f"an overlap needs two deltas or more, got {len(sources)}")
    if names is not None and len(names) != len(sources):
        raise ValueError(f"pass one name for each of the {len(sources)} deltas, got {len(names)} names")
    deltas = [SparseDelta.read(source) for source in sources]
    for delta in deltas[1:]:
        deltas[0].require_same_base(delta)
    modules: dict[str, list[list[Shared]]] = {}
    for path in dict.fromkeys(path for delta in deltas for path in delta.modules):
        column = [delta.modules.get(path) for delta in deltas]
        modules[path] = [[_compare(a, b) for b in column] for a in column]
    return Overlap(list(names or _labels(sources)), modules)


def _labels(sources: Sequence[Any]) -> list[str]:
    """Names of folders, or their paths if names repeat; positions for other sources."""
    paths = [str(s) if isinstance(s, (str, Path)) else f"delta {n}" for n, s in enumerate(sources, 1)]
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _compare(a: ModuleDelta | None, b: ModuleDelta | None) -> Shared:
    total = sum(module.values.numel() for module in (a, b) if module is not None)
    if a is None or b is None:
        return Shared(total=total)
    first, second = in_one_granularity([a.weight_delta(), b.weight_delta()], a.shape)
    positions = shared(first.indices, second.indices)
    x, y = (d.restricted(at).values.double().reshape(-1) for d, at in zip((first, second), positions, strict=True))
    expected = a.values.numel() * b.values.numel() / (a.shape[0] * a.shape[1])
    return Shared(len(x), expected, total, float(x @ y), float(x @ x), float(y @ y))
