"""The overlap of deltas: the Jaccard index of their supports, and the cosine of their values on shared entries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils import CONFIG_NAME
from torch import Tensor

from ..core.fingerprint import sketches_from
from ..core.granularity import Granularity, Shape
from ..core.weight_delta import shared
from ..tuner.files.reading import read_supports
from .delta import ModuleDelta, SparseDelta

if TYPE_CHECKING:
    from rich.table import Table


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
        """``|A and B| / |A or B|`` in entries; 0 if both are empty."""
        return _jaccard(self.both, self.total)

    @property
    def chance(self) -> float:
        """The Jaccard index of random supports: ``e / (|A| + |B| - e)`` with ``e`` the expected shared entries."""
        return _jaccard(self.expected, self.total)

    @property
    def cosine(self) -> float | None:
        """The cosine of the values on the shared entries; None if there are none, or one delta is zero there."""
        norm = (self.square_a * self.square_b) ** 0.5
        return self.product / norm if norm else None


def _jaccard(both: float, total: float) -> float:
    return both / (total - both) if total > both else 0.0


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

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for b in range(len(self.names)) for a in range(b)]

    def matrix(self, measure: str) -> list[list[float | None]]:
        """``[T][T]`` of "jaccard", "chance" or "cosine" over all modules."""
        return [[getattr(pair, measure) for pair in row] for row in self.total]

    def to_dict(self) -> dict[str, Any]:
        """Plain types: the matrices over all modules, and every pair in every module."""
        measures = ("jaccard", "chance", "cosine")

        def entry(a: int, b: int, pair: Shared) -> dict[str, Any]:
            numbers = {measure: getattr(pair, measure) for measure in measures}
            return {"a": self.names[a], "b": self.names[b], **numbers, "shared_entries": pair.both}

        modules = {path: [entry(a, b, pairs[a][b]) for a, b in self._pairs] for path, pairs in self.modules.items()}
        matrices = {measure: self.matrix(measure) for measure in measures}
        return {"names": self.names, **matrices, "modules": modules}

    def table(self, by_module: bool = False) -> Table:
        """A row for each pair and, with ``by_module``, for each of its modules."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Overlap of the supports, in weight entries")
        for heading in ("deltas", *(["module"] if by_module else [])):
            table.add_column(heading, overflow="fold")
        for heading in ("Jaccard", "by chance", "shared", "cosine there"):
            table.add_column(heading, justify="right")
        for a, b in self._pairs:
            rows = [("all", self.total[a][b])]
            rows += [(path, module[a][b]) for path, module in self.modules.items()] if by_module else []
            for path, pair in rows:
                cosine = "" if pair.cosine is None else f"{pair.cosine:+.3f}"
                labels = [f"{self.names[a]}, {self.names[b]}", *([path] if by_module else [])]
                numbers = [f"{pair.jaccard:.3f}", f"{pair.chance:.3f}", f"{int(pair.both):,}", cosine]
                table.add_row(*map(Text, labels), *numbers)
        return table

    def heat_map(self, file: str | Path) -> None:
        """Draw the Jaccard index below the diagonal and its value by chance above it.

        Args:
            file: its suffix determines the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..plots import overlap_plot, save

        save(overlap_plot(self.names, self.matrix("jaccard"), self.matrix("chance"), "Overlap"), file)

    def __str__(self) -> str:
        return "\n".join(
            f"{self.names[a]}, {self.names[b]}: Jaccard {pair.jaccard:.3f}, by chance {pair.chance:.3f}"
            for a, b in self._pairs
            for pair in (self.total[a][b],)
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
    return Overlap(list(names) if names is not None else _labels(sources), modules)


def _labels(sources: Sequence[Any]) -> list[str]:
    """Names of folders, or their paths if names repeat; positions for other sources."""
    paths = [str(s) if isinstance(s, (str, Path)) else f"delta {n}" for n, s in enumerate(sources, 1)]
    short = [Path(path).name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _compare(a: ModuleDelta | None, b: ModuleDelta | None) -> Shared:
    if a is None or b is None:
        return Shared(total=float(sum(module.values.numel() for module in (a, b) if module is not None)))
    counts = _compare_supports((a.granularity, a.indices), (b.granularity, b.indices), a.shape)
    first, second = a.weight_delta(), b.weight_delta()
    if a.granularity != b.granularity:
        first, second = first.as_elements(a.shape), second.as_elements(b.shape)
    positions = shared(first.indices, second.indices)
    x, y = (d.restricted(at).values.double().reshape(-1) for d, at in zip((first, second), positions, strict=True))
    return counts + Shared(product=float(x @ y), square_a=float(x @ x), square_b=float(y @ y))


Support = tuple[Granularity, Tensor]


def _compare_supports(a: Support | None, b: Support | None, shape: Shape) -> Shared:
    sizes = [0 if s is None else len(s[1]) * s[0].parameters_per_unit(shape) for s in (a, b)]
    both = 0 if a is None or b is None else _count_common(a, b, shape)
    return Shared(both, sizes[0] * sizes[1] / (shape[0] * shape[1]), float(sum(sizes)))


def _count_common(a: Support, b: Support, shape: Shape) -> int:
    """Number of entries that two supports share."""
    if a[0] == b[0]:
        return len(shared(a[1], b[1])[0]) * a[0].parameters_per_unit(shape)
    return len(shared(a[0].sorted_elements(a[1], shape)[0], b[0].sorted_elements(b[1], shape)[0])[0])


def shared_entries(a: SparseDelta, b: SparseDelta) -> int:
    """Number of weight entries that both deltas may change."""
    pairs = [(a.modules[path], b.modules[path]) for path in a.modules.keys() & b.modules.keys()]
    return sum(_count_common((x.granularity, x.indices), (y.granularity, y.indices), x.shape) for x, y in pairs)


def support_overlap(folders: Sequence[Path]) -> dict[str, Any] | None:
    """The Jaccard index of every pair of saved supports; the values are not read.

    Raises:
        ValueError: a weight has different shapes.

    Returns:
        ``{"jaccard": [[...]], "chance": [[...]]}``, ``[T, T]``, over all modules. None if a folder has no FGGM adapter.
    """
    if not all(_is_fggm(folder) for folder in folders):
        return None
    supports: list[dict[str, Support]] = []
    shapes: dict[str, Shape] = {}
    for folder in folders:
        config, indices = read_supports(folder)
        supports.append({path: (config.granularity, units) for path, units in indices.items()})
        sketches = sketches_from(config.base_fingerprint or {})
        for path in indices:
            if shapes.setdefault(path, sketches[path].shape) != sketches[path].shape:
                raise ValueError(f"the adapters were made for different base models: {folder} has another {path}")
    modules = {
        path: [[_compare_supports(a.get(path), b.get(path), shape) for b in supports] for a in supports]
        for path, shape in shapes.items()
    }
    result = Overlap([folder.name for folder in folders], modules)
    return {measure: result.matrix(measure) for measure in ("jaccard", "chance")}


def _is_fggm(folder: Path) -> bool:
    file = folder / CONFIG_NAME
    return file.is_file() and json.loads(file.read_text()).get("peft_type") == "FGGM"
