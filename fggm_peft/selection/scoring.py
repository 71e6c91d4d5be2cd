"""From statistics to scores, and from scores to a choice: criterion, threshold policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.criteria import CRITERIA
from ..core.harm_decay import InputMetric
from ..core.statistics import ones
from ..tuner.config import FGGMConfig
from ..tuner.support import Choice, choose_supports, criterion_scores
from ..tuner.target import Targets
from .reference import Reference
from .running_sums import Totals

Choices = dict[str, Choice]


@dataclass(frozen=True)
class Scoring:
    """Scores units of an adapter's targets, and selects from them.

    Args:
        targets: all targets of the adapter.
        config: the adapter's config.
        reference: what the model should keep, if the criterion uses it.
        metrics: module path -> mapping of the layer's inputs, if the criterion uses it.
    """

    targets: Targets
    config: FGGMConfig
    reference: Reference | None
    metrics: Mapping[str, InputMetric] = field(default_factory=dict)

    def choose(
        self,
        group: Targets,
        totals: Totals | None,
        half: int | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> Choices:
        """Select units of a group of targets.

        Args:
            totals: statistics of the task; None if the criterion needs no data.
            half: use one half of the task's samples.
            observe: called with the path and the scores of each module.
        """
        return choose_supports(group, self.config, lambda path: self.scores(path, totals, half), observe)

    def choose_by_reference(self, group: Targets, reference: Reference, half: int) -> Choices:
        """Select by one half of a reference alone, as if the task's statistics were the same everywhere."""
        return choose_supports(group, self.config, lambda path: self._scores(path, None, None, reference, half))

    def scores(self, path: str, totals: Totals | None, half: int | None = None) -> Tensor:
        """Scores of one module's units, ``[units]``."""
        return self._scores(path, totals, half, self.reference, None)

    def _scores(self, path, totals, half, reference: Reference | None, reference_half: int | None) -> Tensor:
        target, criterion = self.targets[path], CRITERIA[self.config.criterion]
        if totals is None:
            device = target.indices.device
            task = {name: ones(name, target.granularity, target.shape).to(device) for name in criterion.task}
        else:
            task = {name: totals.mean(path, name, half) for name in criterion.task}
        statistics: dict[str, Any] = {"task": task, "metric": self.metrics.get(path)}
        if reference is not None:
            ranked, names = self._ranked_with(path), criterion.reference
            statistics["reference"] = {name: reference.values(path, name, reference_half) for name in names}
            statistics["reference_mean"] = {name: reference.mean(name, ranked, reference_half) for name in names}
        return criterion_scores(target, self.config, **statistics)

    def _ranked_with(self, path: str) -> tuple[str, ...]:
        """The modules that are ranked together with this one."""
        policy = self.config.policy(path)
        if policy.scope == "layer":
            return (path,)
        return tuple(other for other in self.targets if self.config.policy(other) == policy)
