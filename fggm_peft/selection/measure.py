"""Reads the references and the task's data, group of modules by group, and selects from the statistics."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.criteria import CRITERIA
from ..core.statistics import STATISTICS
from ..tuner.files.task_scores import StoredScores, stored_scores
from ..tuner.target import Targets
from .agreement import MAX_SAMPLES, MIN_SAMPLES, SUFFICIENT_AGREEMENT, split_half_agreement
from .data_pass import DataPass
from .reference import MeasuredSource, Reference
from .report import AgreementCheck
from .running_sums import Totals
from .scoring import Choices, Scoring


@dataclass
class Outcome:
    """The choice from all samples and from each half of them, and how it was made."""

    num_samples: Any = None
    choices: Choices = field(default_factory=dict)
    halves: tuple[Choices, Choices] = field(default_factory=lambda: ({}, {}))
    samples: int = 0
    reference_samples: int = 0
    reference_seconds: float = 0.0
    sample_passes: int = 0
    scores: dict[str, dict[str, StoredScores]] = field(default_factory=dict)
    checks: list[AgreementCheck] = field(default_factory=list)
    mean_scores: dict[str, float] = field(default_factory=dict)


class Measurement:
    """Measures and selects for one adapter; the results are in ``outcome``.

    Args:
        scoring: makes choices of statistics.
        num_samples: a number, None for all, or "auto".
    """

    def __init__(self, scoring: Scoring, num_samples: Any = None):
        self.scoring, self.outcome = scoring, Outcome(num_samples)
        self.criterion = CRITERIA[scoring.config.criterion]
        self._limits: dict[int, Any] = {}  # every group of modules sees the same samples

    def without_data(self) -> Outcome:
        """Select by a criterion that needs no data."""
        self.outcome.choices = self.scoring.choose(self.scoring.targets, None, observe=self._describe)
        return self.outcome

    def from_data(self, task: DataPass, groups: list[Targets]) -> Outcome:
        """Read the references and the task once for each group of modules."""
        outcome, reference = self.outcome, self.scoring.reference
        measured = reference.measured if reference else []
        for number, group in enumerate(groups, start=1):
            suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
            start = time.perf_counter()
            for index, source in enumerate(measured, start=1):
                name = "reference" if len(measured) == 1 else f"reference {index}"
                self._read_reference(source, group, name, suffix)
            outcome.reference_seconds += time.perf_counter() - start if measured else 0.0
            self._read_task(task, group, suffix)
        asked = outcome.num_samples
        if isinstance(asked, int) and outcome.samples < asked:
            warnings.warn(f"num_samples={asked}, but the data has {outcome.samples}; all were used", stacklevel=3)
        outcome.reference_samples = reference.samples if reference else 0
        return outcome

    def _read_reference(self, source: MeasuredSource, group: Targets, name: str, suffix: str) -> None:
        """Read a reference; with "auto", until two halves of it would rank the units alike."""
        assert self.scoring.reference is not None
        alone = Reference([source], self.scoring.targets)

        def is_enough(totals: Totals) -> bool:
            source.totals = totals
            alone.forget_means()
            return self._agree(
                name, totals, group, *(self.scoring.choose_by_reference(group, alone, h) for h in (0, 1))
            )

        source.totals = self._run(source.data, group, is_enough, "Reference" + suffix)
        source.samples = source.totals.samples
        self.scoring.reference.forget_means()

    def _read_task(self, task: DataPass, group: Targets, suffix: str) -> None:
        def is_enough(totals: Totals) -> bool:
            if not totals.has_halves:
                return False
            return self._agree("task", totals, group, *(self.scoring.choose(group, totals, half) for half in (0, 1)))

        totals = self._run(task, group, is_enough, "Fisher pass" + suffix)
        self.outcome.samples = totals.samples
        self.outcome.choices.update(self.scoring.choose(group, totals, observe=self._describe))
        if totals.has_halves:
            for half, choices in enumerate(self.outcome.halves):
                choices.update(self.scoring.choose(group, totals, half))
        for statistic in self.criterion.task:
            if STATISTICS[statistic].is_kept:
                scores = self.outcome.scores.setdefault(statistic, {})
                for path, target in group.items():
                    scores[path] = stored_scores(totals.mean(path, statistic), target.granularity, target.shape)

    def _run(self, data: DataPass, group: Targets, is_enough, description: str) -> Totals:
        num_samples = self._limits.get(id(data), self.outcome.num_samples)
        if num_samples == "auto":
            totals = data.run(group, MAX_SAMPLES, is_enough, MIN_SAMPLES, description)
        else:
            totals = data.run(group, num_samples, description=description)
        self._limits[id(data)] = totals.samples
        self.outcome.sample_passes += totals.samples
        return totals

    def _agree(self, data: str, totals: Totals, group: Targets, first: Choices, second: Choices) -> bool:
        agreement, _ = split_half_agreement(first, second, unit_entries(group))
        self.outcome.checks.append(AgreementCheck(data, totals.samples, agreement))
        return agreement is None or agreement >= SUFFICIENT_AGREEMENT

    def _describe(self, path: str, scores: Tensor) -> None:
        self.outcome.mean_scores[path] = float(scores.double().mean()) / unit_entries(self.scoring.targets)[path]


def unit_entries(targets: Targets) -> dict[str, int]:
    """Module path -> number of weight entries of one unit."""
    return {path: target.granularity.parameters_per_unit(target.shape) for path, target in targets.items()}
