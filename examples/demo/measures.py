"""What a run is judged by, each with the uncertainty that the few test examples leave.

Every measure is a mean over tasks of a mean over examples. Two methods answer the same examples,
so they are compared example by example; ``standard_error`` covers the choice of the test examples
and nothing else - not the seed, not the order of the data, not the tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from learning import Run

Samples = list[np.ndarray]
"""For each task (or the one general text) one figure an example."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    standard_error: float

    @property
    def is_clear(self) -> bool:
        """More than two standard errors from zero."""
        return abs(self.value) > 2 * self.standard_error


@dataclass(frozen=True)
class Measure:
    """A named figure of a run."""

    name: str
    title: str
    samples: Callable[[Run], Samples]
    higher_is_better: bool
    signed: bool = True
    """Whether it is a change, to be printed with its sign."""

    def of(self, run: Run) -> Estimate:
        """The figure of one run."""
        return _estimate(self.samples(run))

    def advantage(self, run: Run, rival: Run) -> Estimate:
        """How much better ``run`` is than ``rival``, example by example (negative: worse)."""
        sign = 1.0 if self.higher_is_better else -1.0
        pairs = zip(self.samples(run), self.samples(rival), strict=True)
        return _estimate([sign * (ours - theirs) for ours, theirs in pairs])

    def show(self, run: Run) -> str:
        """The figure as text."""
        return f"{self.of(run).value:{'+' if self.signed else ''}.3f}"


def _estimate(samples: Samples) -> Estimate:
    means = [values.mean() for values in samples]
    variances = [values.var() / max(len(values) - 1, 1) for values in samples]
    return Estimate(float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(samples)))


def _learned(run: Run) -> Samples:
    return [np.array(run.snapshots[t + 1].scores[t]) for t in range(_tasks(run))]


def _final(run: Run) -> Samples:
    return [np.array(scores) for scores in run.snapshots[-1].scores]


def _score_change(run: Run) -> Samples:
    earlier = range(_tasks(run) - 1)
    final = run.snapshots[-1].scores
    return [np.array(final[j]) - np.array(run.snapshots[j + 1].scores[j]) for j in earlier]


def _loss_change(run: Run) -> Samples:
    earlier = range(_tasks(run) - 1)
    final = run.snapshots[-1].losses
    return [np.array(final[j]) - np.array(run.snapshots[j + 1].losses[j]) for j in earlier]


def _general_change(run: Run, point: int = -1) -> Samples:
    return [np.array(run.snapshots[point].general) - np.array(run.snapshots[0].general)]


def _worst_general_change(run: Run) -> Samples:
    changes = [_general_change(run, point) for point in range(1, len(run.snapshots))]
    return max(changes, key=lambda change: change[0].mean())


def _tasks(run: Run) -> int:
    return len(run.snapshots) - 1


MEASURES = (
    Measure("learned", "score just after learning", _learned, True, signed=False),
    Measure("final", "final score (OP)", _final, True, signed=False),
    Measure("forgetting_score", "score since then (BWT)", _score_change, True),
    Measure("forgetting_loss", "loss since then", _loss_change, False),
    Measure("general", "general-text loss, end", _general_change, False),
    Measure("worst_general", "general-text loss, worst", _worst_general_change, False),
)
"""OP is the mean score of all tasks at the end. BWT (backward transfer) is the mean, over the
tasks before the last, of the final score minus the score right after learning."""

MEASURE = {measure.name: measure for measure in MEASURES}


def score_matrix(run: Run) -> np.ndarray:
    """``R[t, j]``: mean score on task ``j`` after task ``t``; row 0 is the base model."""
    return np.array([[np.mean(task) for task in point.scores] for point in run.snapshots])


def general_changes(run: Run) -> np.ndarray:
    """``[t]``: change of the mean general-text loss after task ``t``; entry 0 is 0."""
    losses = np.array([np.mean(point.general) for point in run.snapshots])
    return losses - losses[0]
