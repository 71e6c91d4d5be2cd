"""What a selection found, as an object, a table, a dict and a data frame."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..tuner.module_paths import GROUPS, density_grid

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from rich.table import Table

    from ..tuner.files.task_scores import TaskRecord


@dataclass(frozen=True)
class ModuleSelection:
    """What was chosen in one module.

    Args:
        name: module path.
        shape: ``(o, i)`` of the weight.
        units: how many rows, columns or elements there were.
        chosen: how many of them may move.
        parameters: trainable values, bias entries included.
        score_share: share of the module's total score that the chosen units hold.
        agreement: split-half agreement of this module, None if it was not measured.
        mean_score: mean score of a unit, over the weight entries that it holds.
    """

    name: str
    shape: tuple[int, int]
    units: int
    chosen: int
    parameters: int
    score_share: float
    agreement: float | None = None
    mean_score: float = 0.0

    @property
    def density(self) -> float:
        return self.chosen / self.units


@dataclass(frozen=True)
class AgreementCheck:
    """One look of ``num_samples="auto"`` at whether there are samples enough.

    Args:
        data: "task", or "reference" (with a number, if several were read).
        samples: how many there were so far.
        agreement: of what their halves would choose; None where nothing or everything would be chosen.
    """

    data: str
    samples: int
    agreement: float | None


@dataclass(frozen=True)
class SelectionReport:
    """What ``select_parameters`` chose, from how much data, and how sure one may be of it.

    Args:
        granularity: "row", "column" or "element".
        criterion: name of the criterion.
        threshold: the policy as a dict.
        samples: samples used; 0 for a criterion that needs no data.
        agreement: do two halves of the samples choose the same? 1 is perfect, 0 is what chance gives.
            None where no data was used.
        seconds: wall-clock time of the whole selection.
        modules: one entry for each adapted module.
        reference_samples: samples of the reference that were passed over.
        reference_seconds: what that took, within ``seconds``.
        num_samples: what was asked for: a number, "auto", or None for all.
        sample_passes: how often a sample was passed through the model, over all processes: each as often as
            ``score_memory`` made necessary, those of the reference too.
        backward: whether these passes had a backward.
        checks: what "auto" saw, in order; with ``score_memory`` of the first group of modules, which decides.
        record: the task's own statistics, see ``save_scores``.
    """

    granularity: str
    criterion: str
    threshold: dict[str, Any]
    samples: int
    agreement: float | None
    seconds: float
    modules: list[ModuleSelection]
    reference_samples: int = 0
    reference_seconds: float = 0.0
    num_samples: int | Literal["auto"] | None = None
    sample_passes: int = 0
    backward: bool = False
    checks: list[AgreementCheck] = field(default_factory=list)
    record: TaskRecord | None = field(default=None, repr=False, compare=False)

    def save_scores(self, path: str | Path) -> Path:
        """Write the task's own statistics as safetensors, for a later task to take as a reference.

        Float32, a vector for each module; of elements the row and the column sums. The metadata say of what
        granularity, from how many samples and of which base they are.

        Args:
            path: a file, or an existing folder (such as the adapter's), which gets ``fggm_scores.safetensors``.

        Returns:
            The file.

        Raises:
            ValueError: the criterion gathers nothing that a later task could take for a reference.
        """
        if self.record is None:
            raise ValueError("this report has no scores")
        return self.record.save(Path(path))

    @property
    def parameters(self) -> int:
        """Trainable values in all."""
        return sum(module.parameters for module in self.modules)

    @property
    def density(self) -> float:
        """Share of the targeted weights' entries that may move."""
        total = sum(m.shape[0] * m.shape[1] for m in self.modules)
        return sum(m.density * m.shape[0] * m.shape[1] for m in self.modules) / total

    @property
    def samples_per_second(self) -> float:
        """Sample passes in a second of the whole selection."""
        return self.sample_passes / self.seconds if self.seconds else 0.0

    @property
    def reference_share(self) -> float:
        """Share of the time that the reference took, in [0, 1]."""
        return self.reference_seconds / self.seconds if self.seconds else 0.0

    @property
    def cost(self) -> str:
        """What the selection cost, in a sentence."""
        if not self.sample_passes:
            return f"{self.seconds:.1f} s, no pass over data"
        kind = "forward and backward" if self.backward else "forward"
        share = f", {self.reference_share:.0%} of it for the reference" if self.reference_seconds else ""
        passes = f"{self.sample_passes:,} sample passes ({kind}), {self.samples_per_second:.1f} a second"
        return f"{self.seconds:.1f} s{share}; {passes}"

    @property
    def empty_modules(self) -> list[str]:
        """Modules in which nothing may move: every score there was 0, or too low."""
        return [module.name for module in self.modules if not module.chosen]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        result = asdict(replace(self, record=None))
        del result["record"]
        for name in ("parameters", "density", "samples_per_second", "reference_share"):
            result[name] = getattr(self, name)
        for entry, module in zip(result["modules"], self.modules, strict=True):
            entry["shape"], entry["density"] = list(module.shape), module.density
        return result

    def shares(self) -> dict[str, tuple[float, int]]:
        """Module path -> share of its weight that may move, entries of the weight; see ``tuner.layout``."""
        return {module.name: (module.density, module.shape[0] * module.shape[1]) for module in self.modules}

    def agreements(self) -> dict[str, list[tuple[int, float | None]]]:
        """(samples, agreement) of each check, by data; the final agreement is added if it is the same measure."""
        curves: dict[str, list[tuple[int, float | None]]] = {}
        for check in self.checks:
            curves.setdefault(check.data, []).append((check.samples, check.agreement))
        task = curves.get("task", [])
        if task and not self.reference_samples and self.samples > task[-1][0]:
            task.append((self.samples, self.agreement))  # the data ended between two checks
        return curves

    def plots(self) -> Iterator[tuple[str, Figure]]:
        """Name and figure of each plot that the report has data for: density, agreement."""
        from ..plots import agreement_plot, density_plot
        from .scoring import SUFFICIENT_AGREEMENT

        yield "density", density_plot(self.shares())
        curves = self.agreements()
        if any(agreement is not None for curve in curves.values() for _, agreement in curve):
            yield "agreement", agreement_plot(curves, SUFFICIENT_AGREEMENT)

    def summary(self) -> dict[str, Any]:
        """What the adapter's config keeps: nothing that differs from run to run, such as seconds."""
        return {
            "samples": self.samples,
            "reference_samples": self.reference_samples,
            "agreement": self.agreement,
            "density": self.density,
            "parameters": self.parameters,
            "checks": [[check.samples, check.agreement] for check in self.checks if check.data == "task"],
            "densities": density_grid(self.shares(), GROUPS).to_dict(),
        }

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each module. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.to_dict()["modules"]).set_index("name")

    def to_table(self) -> Table:
        """For rich to print, one row for each module."""
        from rich.table import Table

        agreement = "not measured" if self.agreement is None else f"{self.agreement:.3f}"
        against = f" and {self.reference_samples} of the reference" if self.reference_samples else ""
        table = Table(
            title=f"{self.parameters:,} trainable values, {self.density:.2%} of the targeted weights",
            caption=f"criterion {self.criterion}, {self.samples} samples{against}, split-half agreement {agreement}, "
            f"{self.cost}",
        )
        table.add_column("module")
        for heading in ("shape", f"{self.granularity}s", "chosen", "density", "score kept", "agreement"):
            table.add_column(heading, justify="right")
        for m in self.modules:
            table.add_row(
                m.name,
                f"{m.shape[0]} x {m.shape[1]}",
                f"{m.units:,}",
                f"{m.chosen:,}",
                f"{m.density:.2%}",
                f"{m.score_share:.1%}",
                "" if m.agreement is None else f"{m.agreement:.3f}",
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self.to_table())
        return text.getvalue()
