"""The result of a selection as an object, a table and a dict."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from ..tuner.files.task_scores import TaskRecord


@dataclass(frozen=True)
class ModuleSelection:
    """The result of a selection in one module.

    Args:
        name: module path.
        shape: ``(o, i)`` of the weight.
        units: number of rows, columns or elements.
        chosen: number of units that may change.
        parameters: trainable values.
        score_share: share of the module's total score that the chosen units have.
        regret: of this module, None if it was not measured.
    """

    name: str
    shape: tuple[int, int]
    units: int
    chosen: int
    parameters: int
    score_share: float
    regret: float | None = None

    @property
    def density(self) -> float:
        return self.chosen / self.units


@dataclass(frozen=True)
class RegretCheck:
    """One check of ``num_samples="auto"`` whether there are enough samples.

    Args:
        data: "task", or "reference" (with a number, if several were read).
        samples: number of samples so far.
        regret: estimated share of the best possible score that the selection misses; None if every score is 0.
    """

    data: str
    samples: int
    regret: float | None


@dataclass(frozen=True)
class SelectionReport:
    """What ``select_parameters`` selected, from how much data, and how stable the selection is.

    Args:
        granularity: name of the granularity, with its arguments, such as "column" or "row_block(size=64)".
        criterion: name of the criterion.
        threshold: the policy as a dict.
        samples: samples used; 0 for a criterion that needs no data.
        regret: share of the best possible score that the selection misses, estimated from two halves of the samples: 0
            is perfect. None without data.
        seconds: wall-clock time of the whole selection.
        modules: one entry for each adapted module.
        reference_samples: samples that were read for the reference.
        sample_passes: number of samples that went through the model, over all processes, groups of modules and
            references.
        checks: the checks of "auto" in order; with ``score_memory``, those of the first group of modules.
        record: the statistics of the task, see ``save_scores``.
    """

    granularity: str
    criterion: str
    threshold: dict[str, Any]
    samples: int
    regret: float | None
    seconds: float
    modules: list[ModuleSelection]
    reference_samples: int = 0
    sample_passes: int = 0
    checks: list[RegretCheck] = field(default_factory=list)
    record: TaskRecord | None = field(default=None, repr=False, compare=False)

    def save_scores(self, path: str | Path) -> Path:
        """Write the statistics of the task as safetensors, so that a later task can use them as a reference.

        Each module has a float32 vector; for elements, the row sums and the column sums.

        Args:
            path: a file, or an existing folder (such as the adapter's) for ``fggm_scores.safetensors``.

        Raises:
            ValueError: the criterion collects no statistics that can be a reference.
        """
        if self.record is None:
            raise ValueError("this report has no scores")
        return self.record.save(Path(path))

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        return sum(module.parameters for module in self.modules)

    @property
    def density(self) -> float:
        """Share of the targeted weights' entries that may change."""
        total = sum(m.shape[0] * m.shape[1] for m in self.modules)
        return sum(m.density * m.shape[0] * m.shape[1] for m in self.modules) / total

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        result = asdict(replace(self, record=None))
        del result["record"]
        result |= {"parameters": self.parameters, "density": self.density}
        for entry, module in zip(result["modules"], self.modules, strict=True):
            entry["shape"], entry["density"] = list(module.shape), module.density
        return result

    def summary(self) -> dict[str, Any]:
        """The part that the adapter's config stores. It is the same in every run, so it contains no times."""
        return {
            "samples": self.samples,
            "reference_samples": self.reference_samples,
            "regret": self.regret,
            "density": self.density,
            "parameters": self.parameters,
            "checks": [[check.samples, check.regret] for check in self.checks if check.data == "task"],
        }

    def to_table(self) -> Table:
        """A rich table with one row for each module."""
        from rich.table import Table

        regret = "not measured" if self.regret is None else f"{self.regret:.1%}"
        against = f" and {self.reference_samples} of the reference" if self.reference_samples else ""
        cost = f"{self.sample_passes:,} sample passes, {self.seconds:.1f} s"
        table = Table(
            title=f"{self.parameters:,} trainable values, {self.density:.2%} of the targeted weights",
            caption=f"criterion {self.criterion}, {self.samples} samples{against}, regret {regret}, {cost}",
        )
        table.add_column("module", overflow="fold")
        for heading in ("shape", "units", "chosen", "density", "score share", "regret"):
            table.add_column(heading, justify="right")
        for m in self.modules:
            numbers = f"{m.units:,}", f"{m.chosen:,}", f"{m.density:.2%}", f"{m.score_share:.1%}"
            regret = "" if m.regret is None else f"{m.regret:.1%}"
            table.add_row(m.name, f"{m.shape[0]} x {m.shape[1]}", *numbers, regret)
        return table

    def _repr_mimebundle_(self, include: Any = (), exclude: Any = ()) -> dict[str, str]:
        """The table, for notebooks."""
        return self.to_table()._repr_mimebundle_(include, exclude)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self.to_table())
        return text.getvalue()
