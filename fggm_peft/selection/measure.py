"""Reads the references and the task's data, group of modules by group, and selects from their statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

from torch import Tensor

from ..core.criteria import CRITERIA, Criterion
from ..core.statistics import STATISTICS
from ..tuner.files.task_scores import StoredScores, stored_scores
from ..tuner.settings.selection import score_bytes
from ..tuner.support import Choice, by_policy, choose_supports, criterion_scores, selected_together
from ..tuner.target import Target, Targets
from .data_pass import DataPass
from .reference import Reference, Source, ones_of
from .regret import MAX_SAMPLES, MIN_SAMPLES, HalfScores, regret_of, split_half_scores
from .report import RegretCheck
from .running_sums import Totals

Choices = dict[str, Choice]


class Measurement:
    """Measures and selects for one adapter. The results are in the attributes.

    ``task`` reads the task's data. ``num_samples`` is a number, None for all, or "auto".
    """

    def __init__(self, task: DataPass, targets: Targets, sources: Sequence[Source], num_samples: Any = None):
        self.task, self.targets, self.sources, self.num_samples = task, targets, sources, num_samples
        self.config, self.criterion = task.config, CRITERIA[task.config.criterion]
        self.reference = Reference(sources, targets)
        self.choices: Choices = {}
        self.half_scores: HalfScores = {}
        self.samples = self.reference_samples = self.sample_passes = 0
        self.scores: dict[str, dict[str, StoredScores]] = {}
        self.checks: list[RegretCheck] = []
        self._limits: dict[int, Any] = {}  # every group of modules sees the same samples

    def run(self) -> None:
        """Read the references and the task, if the criterion needs data, and select.

        The data are read once for each group of modules that ``score_memory`` holds.

        Raises:
            ValueError: the memory holds no single module, or several passes are needed and not possible.
        """
        if not self.criterion.needs_data:
            self.choices = choose_supports(self.targets, self.config, self._score)
            return
        groups = self._groups()
        for number, group in enumerate(groups, start=1):
            suffix = f" {number}/{len(groups)}" if len(groups) > 1 else ""
            self._read_references(group, suffix)
            self._read_task(group, suffix)
        if isinstance(self.num_samples, int) and self.samples < self.num_samples:
            message = f"num_samples={self.num_samples}, but the data has {self.samples}; all were used"
            warnings.warn(message, stacklevel=3)

    def _read_references(self, group: Targets, suffix: str) -> None:
        """Read each reference; with "auto", until two halves of it would select equally good units."""
        measured = [source for source in self.sources if source.data is not None]
        for number, source in enumerate(measured, start=1):
            name = "reference" if len(measured) == 1 else f"reference {number}"

            def is_enough(totals: Totals, name: str = name) -> bool:
                alone = Reference([Source(totals=totals)], self.targets)
                scores = split_half_scores(
                    group, self.config, lambda path, half: self._score(path, None, None, alone, half)
                )
                return self._is_good(name, totals.samples, scores)

            assert source.data is not None
            source.totals = self._pass(source.data, group, is_enough, "Reference" + suffix)
        if measured:
            self.reference = Reference(self.sources, self.targets)
            self.reference_samples = sum(source.totals.samples for source in measured if source.totals)

    def _read_task(self, group: Targets, suffix: str) -> None:
        def measured(totals: Totals) -> HalfScores:
            return split_half_scores(group, self.config, lambda path, half: self._score(path, totals, half))

        checked: dict[int, HalfScores] = {}  # number of samples -> result of a check

        def is_enough(totals: Totals) -> bool:
            if not totals.has_halves:
                return False
            checked[totals.samples] = measured(totals)
            return self._is_good("task", totals.samples, checked[totals.samples])

        totals = self._pass(self.task, group, is_enough, "Selection pass" + suffix)
        self.samples = totals.samples
        self.choices.update(choose_supports(group, self.config, partial(self._score, totals=totals)))
        if totals.has_halves:
            self.half_scores |= checked.get(totals.samples) or measured(totals)
        for statistic in self.criterion.task:
            if STATISTICS[statistic].is_kept:
                scores = self.scores.setdefault(statistic, {})
                for path, target in group.items():
                    scores[path] = stored_scores(totals.mean(path, statistic), target.granularity, target.shape)

    def _pass(self, data: DataPass, group: Targets, is_enough, description: str) -> Totals:
        limit = self._limits.get(id(data), self.num_samples)
        if limit == "auto":
            totals = data.run(group, MAX_SAMPLES, is_enough, MIN_SAMPLES, description)
        else:
            totals = data.run(group, limit, description=description)
        self._limits[id(data)] = totals.samples
        self.sample_passes += totals.samples
        return totals

    def _is_good(self, data: str, samples: int, scores: HalfScores) -> bool:
        regret = regret_of(scores.values())
        self.checks.append(RegretCheck(data, samples, regret))
        return regret is None or regret <= self.config.regret

    # Scores -------------------------------------------------------------------------------------

    def _score(
        self,
        path: str,
        totals: Totals | None = None,
        half: int | None = None,
        reference: Reference | None = None,
        reference_half: int | None = None,
    ) -> Tensor:
        """The scores of one weight, ``[units]``, from all samples or from one half of the task's or the reference's.

        Without ``totals``, the statistics of the task are the same everywhere.
        """
        reference = reference or self.reference
        target, names, ranked = self.targets[path], self.criterion.reference, self._ranked_with[path]
        return criterion_scores(
            target,
            self.config,
            task={
                name: ones_of(target, name) if totals is None else totals.mean(path, name, half)
                for name in self.criterion.task
            },
            reference={name: reference.values(target, name, reference_half) for name in names},
            reference_mean={name: reference.mean(ranked, name, reference_half) for name in names},
            metric=self.task.metrics.get(path),
        )

    @cached_property
    def _ranked_with(self) -> dict[str, tuple[str, ...]]:
        """Module path -> the modules that are ranked together with it."""
        groups = [[*chain(*(part.targets for part in group))] for _, group in by_policy(self.targets, self.config)]
        return {path: tuple(group) for group in groups for path in group}

    # Memory -------------------------------------------------------------------------------------

    def _groups(self) -> list[Targets]:
        """Groups of targets whose running sums fit into ``score_memory`` together."""
        score_memory = self.config.score_memory
        if score_memory is None:
            return [self.targets]
        measured = [source.data for source in self.sources if source.data is not None]
        bound = score_bytes(score_memory)
        groups: list[Targets] = []
        used = bound + 1
        for name, part in selected_together(self.targets, self.config).items():
            size = sum(running_bytes(target, self.criterion, len(measured)) for target in part.targets.values())
            if size > bound:
                raise ValueError(
                    f"score_memory={score_memory!r} is too small: the scores of {name} alone take {size} bytes"
                )
            if used + size > bound:
                groups.append({})
                used = 0
            groups[-1] |= part.targets
            used += size
        if len(groups) > 1:
            if any(self.config.policy(path).scope == "global" for path in self.targets):
                raise ValueError(
                    "a threshold of global scope requires the scores of all modules at once, and "
                    f"score_memory={score_memory!r} is too small for them. Raise it, or use scope='layer'."
                )
            if any(isinstance(data.dataloader, Iterator) for data in (self.task, *measured)):
                raise ValueError(
                    f"score_memory requires {len(groups)} passes over the data, and this dataloader is an iterator "
                    "that can be read once; pass a DataLoader or a list of batches"
                )
            if measured and len(self.sources) > 1:
                raise ValueError(
                    "several references are scaled by their means over all modules, and score_memory is too small for "
                    "the scores of all modules at once. Raise it, or use one reference or saved ones "
                    "(report.save_scores)."
                )
        return groups


def running_bytes(target: Target, criterion: Criterion, sources: int) -> int:
    """Bytes of the running sums of one module, for the task and for each of the ``sources`` that are read from data."""
    names = [*criterion.task, *criterion.reference * sources]
    return 2 * 4 * sum(STATISTICS[name].size(target.granularity, target.shape) for name in names)
