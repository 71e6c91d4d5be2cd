"""Passes over the data and the reference -> scores -> what may move, group of modules by group."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..core.criteria import CRITERIA, Criterion
from ..core.statistics import STATISTICS, ones
from ..tuner.config import FGGMConfig
from ..tuner.files.task_scores import StoredScores, stored_scores
from ..tuner.layer import FGGMLayer
from ..tuner.settings.selection import score_bytes
from ..tuner.support import Choice, choose_supports, criterion_scores
from ..tuner.target import Target
from .agreement import split_half_agreement
from .data_pass import FisherPass, Totals
from .protection import Protection
from .reference import LiveSource, Reference
from .report import AgreementCheck

MIN_SAMPLES = 32
MAX_SAMPLES = 1024
SUFFICIENT_AGREEMENT = 0.8
"""With halves that agree like this, 99 % of the score that ever more samples find is found (docs/choosing.md)."""

Group = dict[str, FGGMLayer]
Choices = dict[str, Choice]


@dataclass
class Outcome:
    """What was chosen, from all samples and from each half of them, and what should be remembered of the task."""

    choices: Choices = field(default_factory=dict)
    halves: tuple[Choices, Choices] = field(default_factory=lambda: ({}, {}))
    samples: int = 0
    reference_samples: int = 0
    reference_seconds: float = 0.0
    scores: dict[str, dict[str, StoredScores]] = field(default_factory=dict)
    sample_passes: int = 0
    checks: list[AgreementCheck] = field(default_factory=list)
    mean_scores: dict[str, float] = field(default_factory=dict)
    num_samples: Any = None


class Chooser:
    """Chooses for one adapter.

    Args:
        layers: module path -> layer.
        config: the adapter's.
        adapter_name: its name.
        protection: what earlier deltas hold.
        reference: what the model should keep, if the criterion looks at it.
    """

    def __init__(
        self, layers: Group, config: FGGMConfig, adapter_name: str, protection: Protection, reference: Reference | None
    ):
        self.layers, self.config, self.adapter_name = layers, config, adapter_name
        self.protection, self.reference = protection, reference
        self.criterion = CRITERIA[config.criterion]

    def without_data(self) -> Outcome:
        """For a criterion that needs none."""
        outcome = Outcome()
        outcome.choices = self._choose(self.layers, None, self.reference, described_in=outcome)
        return outcome

    def from_data(self, task: FisherPass, num_samples: Any, score_memory: int | str | None) -> Outcome:
        """Pass over the reference and the task's data, once for each group of modules that memory holds."""
        groups = self.groups(task, score_memory)
        outcome = Outcome(num_samples=num_samples)
        limits: dict[Any, Any] = {}
        for number, group in enumerate(groups):
            suffix = f" {number + 1}/{len(groups)}" if len(groups) > 1 else ""
            start = time.perf_counter()
            live = self.reference.live if self.reference else []
            for place, source in enumerate(live, start=1):
                name = "reference" if len(live) == 1 else f"reference {place}"
                self._measure(outcome, source, group, limits.get(source, num_samples), name, suffix)
                limits[source] = source.samples  # every group of modules sees the same samples
            outcome.reference_seconds += time.perf_counter() - start if live else 0.0
            self._choose_group(outcome, task, group, limits.get(task, num_samples), "Fisher pass" + suffix)
            limits[task] = outcome.samples
        if isinstance(num_samples, int) and outcome.samples < num_samples:
            warnings.warn(f"num_samples={num_samples}, but the data has {outcome.samples}; all were used", stacklevel=3)
        outcome.reference_samples = self.reference.samples if self.reference else 0
        return outcome

    def _measure(
        self, outcome: Outcome, source: LiveSource, group: Group, num_samples: Any, name: str, suffix: str
    ) -> None:
        """Pass over a reference; with "auto", until two halves of it would rank the units alike."""
        assert self.reference is not None
        alone = Reference([source], self.layers, self.adapter_name)
        choose = partial(self._choose, group, None, alone)

        def enough(totals: Totals) -> bool:
            source.totals = totals
            alone.forget()
            halves = choose(reference_half=0), choose(reference_half=1)
            return self._agree(outcome, name, totals.samples, group, *halves)

        source.totals = self._run(source.fisher_pass, group, num_samples, enough, "Reference" + suffix)
        source.samples = source.totals.samples
        outcome.sample_passes += source.samples
        self.reference.forget()

    def _choose_group(
        self, outcome: Outcome, task: FisherPass, group: Group, num_samples: Any, description: str
    ) -> None:
        def enough(totals: Totals) -> bool:
            if not totals.has_halves:
                return False
            halves = (self._choose(group, totals, self.reference, half) for half in (0, 1))
            return self._agree(outcome, "task", totals.samples, group, *halves)

        totals = self._run(task, group, num_samples, enough, description)
        outcome.samples = totals.samples
        outcome.sample_passes += totals.samples
        outcome.choices.update(self._choose(group, totals, self.reference, described_in=outcome))
        if totals.has_halves:
            for half, chosen in enumerate(outcome.halves):
                chosen.update(self._choose(group, totals, self.reference, half, half))
        for statistic in self.criterion.task:
            if STATISTICS[statistic].is_kept:
                kept = outcome.scores.setdefault(statistic, {})
                for name, layer in group.items():
                    granularity = layer.granularity[self.adapter_name]
                    kept[name] = stored_scores(totals.mean(name, statistic), granularity, layer.weight_shape)

    @staticmethod
    def _run(data: FisherPass, group: Group, num_samples: Any, enough, description: str) -> Totals:
        automatic = num_samples == "auto"
        limit = MAX_SAMPLES if automatic else num_samples
        return data.run(group, limit, enough if automatic else None, MIN_SAMPLES, description)

    def _agree(self, outcome: Outcome, data: str, samples: int, group: Group, first: Choices, second: Choices) -> bool:
        agreement, _ = split_half_agreement(first, second, costs(group, self.adapter_name))
        outcome.checks.append(AgreementCheck(data, samples, agreement))
        return agreement is None or agreement >= SUFFICIENT_AGREEMENT

    def _choose(
        self,
        group: Group,
        totals: Totals | None,
        reference: Reference | None,
        half: int | None = None,
        reference_half: int | None = None,
        described_in: Outcome | None = None,
    ) -> Choices:
        """What the thresholds choose.

        Args:
            totals: the task's statistics; None for ones, so that the reference alone decides.
            half: take them from one half of the samples.
            reference_half: the same of the reference.
            described_in: gets the mean scores.
        """

        def scores(name: str) -> Tensor:
            layer = group[name]
            granularity, device = layer.granularity[self.adapter_name], layer.fggm_indices[self.adapter_name].device
            if totals is None:
                task = {k: ones(k, granularity, layer.weight_shape).to(device) for k in self.criterion.task}
            else:
                task = {key: totals.mean(name, key, half) for key in self.criterion.task}
            against: dict[str, Any] = {}
            if reference is not None:
                together = self._ranked_with(name)
                against["reference"] = {k: reference.values(name, k, reference_half) for k in self.criterion.reference}
                against["reference_mean"] = {
                    key: reference.mean(key, together, reference_half) for key in self.criterion.reference
                }
            found = criterion_scores(Target(name, layer, self.adapter_name), self.config, task=task, **against)
            return self.protection.applied(name, found)

        observe = None if described_in is None else partial(self._describe, described_in)
        targets = {name: Target(name, layer, self.adapter_name) for name, layer in group.items()}
        return choose_supports(targets, self.config, scores, observe)

    def _describe(self, outcome: Outcome, name: str, scores: Tensor) -> None:
        layer = self.layers[name]
        entries = layer.granularity[self.adapter_name].parameters_per_unit(layer.weight_shape)
        outcome.mean_scores[name] = float(scores.double().mean()) / entries

    def _ranked_with(self, name: str) -> tuple[str, ...]:
        """The modules that are ranked together with one."""
        policy = self.config.policy(name)
        if policy.scope == "layer":
            return (name,)
        return tuple(other for other in self.layers if self.config.policy(other) == policy)

    def groups(self, task: FisherPass, score_memory: int | str | None) -> list[Group]:
        """The modules whose running sums fit into ``score_memory`` together, group by group.

        Raises:
            ValueError: it holds too little, or makes several passes necessary that cannot be made.
        """
        groups = self._groups(score_memory)
        if len(groups) > 1:
            self._require_repeatable(task, len(groups))
        return groups

    def _groups(self, score_memory: int | str | None) -> list[Group]:
        """The modules whose running sums fit into ``score_memory`` together, group by group."""
        if score_memory is None:
            return [dict(self.layers)]
        bound = score_bytes(score_memory)
        groups: list[Group] = []
        filled = bound + 1
        for name, layer in self.layers.items():
            sources = len(self.reference.live) if self.reference else 0
            size = running_bytes(Target(name, layer, self.adapter_name), self.criterion, sources)
            if size > bound:
                raise ValueError(
                    f"score_memory={score_memory!r} is too small: the scores of {name} alone take {size} bytes"
                )
            if filled + size > bound:
                groups.append({})
                filled = 0
            groups[-1][name] = layer
            filled += size
        if len(groups) > 1 and any(self.config.policy(name).scope == "global" for name in self.layers):
            raise ValueError(
                "a threshold of global scope needs the scores of all modules at once, which "
                f"score_memory={score_memory!r} does not hold. Raise it, or use scope='layer'."
            )
        return groups

    def _require_repeatable(self, task: FisherPass, passes: int) -> None:
        task.require_repeatable(passes)
        if self.reference is None:
            return
        for source in self.reference.live:
            source.fisher_pass.require_repeatable(passes)
        if self.reference.live and len(self.reference.sources) > 1:
            raise ValueError(
                "several references are put in proportion by their means over all modules, and score_memory does not "
                "hold those of all at once. Raise it, give one reference, or one that is saved (report.save_scores)."
            )


def costs(layers: Mapping[str, FGGMLayer], adapter_name: str) -> dict[str, int]:
    """Module path -> how many weight entries one of its units holds."""
    return {
        name: layer.granularity[adapter_name].parameters_per_unit(layer.weight_shape) for name, layer in layers.items()
    }


def running_bytes(target: Target, criterion: Criterion, sources: int) -> int:
    """Bytes of the running sums of one module: two halves in float32, of the task and of each reference.

    Args:
        sources: number of references that are read from data and not from saved scores.
    """
    names = [*criterion.task, *criterion.reference * sources]
    return 2 * 4 * sum(STATISTICS[name].size(target.granularity, target.shape) for name in names)
