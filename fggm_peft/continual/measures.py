"""Measures of a sequence of tasks, and statistics over several runs.

Convention: ``scores[t, j]`` is the score on task ``j`` after training on task ``t``, both in the order of training;
higher is better. The formulas count tasks from 1 to T, as the papers do; the arrays count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..core import Registry


class Record(NamedTuple):
    """The values of one run that measures are computed from, float64; NaN is a missing value.

    Args:
        scores: ``[T, T]``, or ``[1, T]`` for a method that learned all tasks at once.
        zero_shot: ``[T]``, the scores of the base model.
        losses: ``[T + 1]`` or ``[2]``, the loss on general text of the base model and after each task; may be empty.
        other_losses: the same on the other text.
        divergences: ``[T]``, KL(base || model) on each task right after it; may be empty.
    """

    scores: NDArray[np.float64]
    zero_shot: NDArray[np.float64]
    losses: NDArray[np.float64] = np.empty(0)
    other_losses: NDArray[np.float64] = np.empty(0)
    divergences: NDArray[np.float64] = np.empty(0)


@dataclass(frozen=True)
class Measure:
    """A function of a run, whose docstring begins with the formula, and how reports show it."""

    compute: Callable[[Record], float | None]  # None: not defined for this run
    heading: str
    of_last_row: bool = False  # also defined for a method that learned all tasks at once

    @property
    def formula(self) -> str:
        return re.findall("``(.+?)``", self.compute.__doc__ or "")[0]


MEASURES: Registry[Measure] = Registry("measure", make=Measure)
"""Name in a result -> measure."""


def measures_of(*values: ArrayLike) -> dict[str, float | None]:
    """All measures of a run by name; the arguments are those of ``Record``, with None for missing values."""
    record = Record(*(np.asarray(array, dtype=np.float64) for array in values))
    is_complete = len(record.scores) == len(record.zero_shot)
    entries = ((name, MEASURES[name]) for name in MEASURES)
    computed = {name: m.compute(record) if is_complete or m.of_last_row else None for name, m in entries}
    return {name: None if value is None else float(value) for name, value in computed.items()}


@MEASURES.register("op", heading="OP", of_last_row=True)
def op(run: Record) -> float:
    """``OP_T = mean_j R[T,j]``: overall performance after the last task; TRACE and FGGM call it OP."""
    return run.scores[-1].mean()


@MEASURES.register("op_mean", heading="mean OP")
def op_mean(run: Record) -> float:
    """``mean_t OP_t``: overall performance on the tasks so far, averaged over the steps. It differs from ``OP_T``."""
    return float(np.mean([row[: t + 1].mean() for t, row in enumerate(run.scores)]))


@MEASURES.register("diagonal", heading="learned")
def diagonal(run: Record) -> float:
    """``mean_t R[t,t]``: what was learned, each task measured right after it."""
    return np.diagonal(run.scores).mean()


@MEASURES.register("bwt", heading="BWT")
def bwt(run: Record) -> float | None:
    """``BWT_T = mean_{j<T} (R[T,j] - R[j,j])`` (Lopez-Paz and Ranzato 2017; TRACE); None for a single task.

    Backward transfer is negative if tasks were forgotten. The last task does not count.
    """
    changes = (run.scores[-1] - np.diagonal(run.scores))[:-1]
    return changes.mean() if len(changes) else None


@MEASURES.register("forgetting", heading="forgetting")
def forgetting(run: Record) -> float | None:
    """``mean_{j<T} (max_{j<=t<T} R[t,j] - R[T,j])`` (Chaudhry et al. 2018); None for a single task.

    It compares with the best score of a task before the last task was trained, not with the score right after it. If
    tasks gained later, it is higher than ``-BWT_T``. It is negative if the last task helped the others.
    """
    *earlier, last = run.scores
    losses = [np.max([row[j] for row in earlier[j:]]) - last[j] for j in range(len(earlier))]
    return float(np.mean(losses)) if losses else None


@MEASURES.register("fwt", heading="FWT")
def fwt(run: Record) -> float | None:
    """``mean_{j>1} (R[j-1,j] - r0[j])``: how much earlier tasks helped with a task before it was trained.

    Forward transfer is None for a single task, or if a score that it needs is missing.
    """
    gains = np.diagonal(run.scores, offset=1) - run.zero_shot[1:]
    return gains.mean() if len(gains) and np.isfinite(gains).all() else None


@MEASURES.register("general", heading="general loss", of_last_row=True)
def general(run: Record) -> float | None:
    """``L[T] - L[0]``: change of the mean next-token loss on general text, in nats; + is worse. None without a text."""
    return run.losses[-1] - run.losses[0] if len(run.losses) else None


@MEASURES.register("general_worst", heading="worst general loss", of_last_row=True)
def general_worst(run: Record) -> float | None:
    """``max_t L[t] - L[0]``: the same at its worst, after any task."""
    return run.losses[1:].max() - run.losses[0] if len(run.losses) else None


@MEASURES.register("other", heading="other loss", of_last_row=True)
def other(run: Record) -> float | None:
    """``M[T] - M[0]``: the same on text of another kind, ``other`` of the stream's ``general``."""
    return run.other_losses[-1] - run.other_losses[0] if len(run.other_losses) else None


@MEASURES.register("kl", heading="KL", of_last_row=True)
def kl(run: Record) -> float | None:
    """``mean_t KL(base || model_t)`` on answers of task t right after it, in nats: how far learning moved the model."""
    return run.divergences.mean() if len(run.divergences) else None


# --- several runs --------------------------------------------------------------------------------


def summary_of(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Statistics of the values that are not missing; None if there are none.

    Returns:
        ``{"mean", "std", "n", "interval"}``: ``std`` is the sample standard deviation (n - 1), and ``interval`` the
        95 % confidence interval of the mean by Student's t. Both are None for one value.
    """
    from scipy import stats

    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    n = len(numbers)
    if n < 2:
        return {"mean": float(numbers[0]), "std": None, "n": 1, "interval": None} if n else None
    mean, half = float(numbers.mean()), float(stats.t.ppf(0.975, n - 1) * stats.sem(numbers))
    return {"mean": mean, "std": float(numbers.std(ddof=1)), "n": n, "interval": [mean - half, mean + half]}


def fixed(value: float, form: str = ".3f") -> str:
    """A number as text with a minus sign (\u2212), but what rounds to zero has none."""
    text = f"{value:{form}}"
    return (text if float(text.replace(",", "")) else f"{0.0:{form}}").replace("-", "\u2212")


def signed(change: float) -> str:
    """A change with its sign and two decimals."""
    return fixed(change, "+.2f")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points ``(learned, cost)`` that no other point dominates, in the given order.

    A point is dominated by one that learned at least as much at no more cost, one of them strictly. Equal points do
    not dominate each other.
    """

    def dominates(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return p[0] >= q[0] and p[1] <= q[1] and p != q

    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
