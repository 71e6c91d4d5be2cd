"""Measures of a sequence of tasks from the matrix of its scores, and comparisons of runs over seeds and orders.

Convention: ``scores[t, j]`` is the score on task ``j`` after training on task ``t``, both in the order of training;
higher is better. The formulas count tasks from 1 to T, as the papers do; the arrays count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Measure:
    """A measure and its formula, as a report prints it.

    ``compute`` takes scores ``[T, T]`` and zero-shot scores ``[T]`` or None; it returns None if it is not defined.
    """

    compute: Callable[[ArrayLike, ArrayLike | None], float | None]
    formula: str


def op_per_step(scores: ArrayLike) -> list[float]:
    """``OP_t = mean_{j<=t} R[t,j]`` for every t: overall performance on the tasks seen so far (TRACE)."""
    matrix = checked_scores(scores)
    return [float(matrix[t, : t + 1].mean()) for t in range(len(matrix))]


def op(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float:
    """``OP_T = mean_j R[T,j]``: overall performance after the last task; TRACE and FGGM call it OP."""
    return op_per_step(scores)[-1]


def op_mean(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float:
    """``mean_t OP_t``: overall performance, averaged over the steps. It differs from ``OP_T``."""
    return float(np.mean(op_per_step(scores)))


def diagonal(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float:
    """``mean_t R[t,t]``: what was learned, each task measured right after it."""
    return float(np.diagonal(checked_scores(scores)).mean())


def bwt(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float | None:
    """``BWT_T = mean_{j<T} (R[T,j] - R[j,j])`` (Lopez-Paz and Ranzato 2017; TRACE); None for a single task.

    Backward transfer is negative if tasks were forgotten. The last task does not count.
    """
    matrix = checked_scores(scores)
    return float((matrix[-1] - np.diagonal(matrix))[:-1].mean()) if len(matrix) > 1 else None


def forgetting(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float | None:
    """``mean_{j<T} (max_{j<=t<T} R[t,j] - R[T,j])`` (Chaudhry et al. 2018); None for a single task.

    It compares with the best score of a task before the last task was trained, not with the score right after it. If
    tasks gained later, it is higher than ``-BWT_T``. It is negative if the last task helped the others.
    """
    matrix = checked_scores(scores)
    last = len(matrix) - 1
    return float(np.mean([matrix[j:last, j].max() - matrix[last, j] for j in range(last)])) if last else None


def fwt(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float | None:
    """``mean_{j>1} (R[j-1,j] - r0[j])``: how much earlier tasks helped with a task before it was trained.

    Forward transfer is None for a single task, without zero-shot scores ``r0``, or if a task was not evaluated before
    it was trained.

    Raises:
        ValueError: as ``checked_scores``, or the number of zero-shot scores differs from the number of tasks.
    """
    matrix = checked_scores(scores)
    if zero_shot is None:
        return None
    start = np.asarray(zero_shot, dtype=np.float64)
    if start.shape != (len(matrix),) or np.isinf(start).any():
        raise ValueError(f"zero-shot scores must be one number for each of {len(matrix)} tasks, got {start.tolist()}")
    gains = np.diagonal(matrix, offset=1) - start[1:]
    return None if not len(gains) or np.isnan(gains).any() else float(gains.mean())


MEASURES: dict[str, Measure] = {
    "op": Measure(op, "OP_T = mean_j R[T,j]"),
    "op_mean": Measure(op_mean, "mean_t OP_t"),
    "diagonal": Measure(diagonal, "mean_t R[t,t]"),
    "bwt": Measure(bwt, "BWT_T = mean_{j<T} (R[T,j] - R[j,j])"),
    "forgetting": Measure(forgetting, "mean_{j<T} (max_{j<=t<T} R[t,j] - R[T,j])"),
    "fwt": Measure(fwt, "mean_{j>1} (R[j-1,j] - r0[j])"),
}
"""Name in a result -> measure."""


def measures_of(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> dict[str, float | None]:
    """All measures of one run by name, from scores ``[T, T]`` and, for ``fwt``, zero-shot scores ``[T]``."""
    return {name: measure.compute(scores, zero_shot) for name, measure in MEASURES.items()}


def checked_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """The scores as float64 ``[T, T]``.

    Raises:
        ValueError: they are not square, or one on or below the diagonal is missing or infinite. Above the diagonal,
            NaN stands for a task that was not evaluated before it was trained.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"scores must be a square [tasks, tasks], got the shape {list(matrix.shape)}; reduce a run that is not "
            "finished to its finished tasks"
        )
    is_missing = ~np.isfinite(matrix) & ~(np.isnan(matrix) & np.triu(np.ones_like(matrix, dtype=bool), k=1))
    if is_missing.any():
        t, j = np.argwhere(is_missing)[0]
        raise ValueError(f"the score on task {j + 1} after task {t + 1} is {matrix[t, j]}; every measure needs it")
    return matrix


@dataclass(frozen=True)
class Summary:
    """A value over several runs.

    ``std`` is the sample standard deviation (n - 1), ``interval`` the confidence interval of the mean by Student's t;
    both are None for one run.
    """

    mean: float
    std: float | None
    n: int
    interval: list[float] | None
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference(Summary):
    """A summary of ``a - b`` of two methods, pair by pair. ``unpaired`` has the runs that only one of them has."""

    unpaired: tuple[Hashable, ...] = ()

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero; never for one pair."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        unpaired = [list(key) if isinstance(key, tuple) else key for key in self.unpaired]
        return {**asdict(self), "is_clear": self.is_clear, "unpaired": unpaired}


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and confidence interval of a value over several runs.

    Raises:
        ValueError: there are no values, one is not finite, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a summary needs at least one value and only finite ones, got {list(values)}")
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Summary(mean, None, n, None, confidence)
    from scipy import stats

    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(values))
    return Summary(mean, float(np.std(values, ddof=1)), n, [mean - half, mean + half], confidence)


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], confidence: float = 0.95
) -> PairedDifference:
    """The mean of ``a - b`` over runs with the same key, usually ``(seed, order)``, and its interval.

    Pairing removes the effect of seed and order on both methods, which often exceeds the difference between them.

    Raises:
        ValueError: no key is in both.
    """
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(f"no run to pair: one method has {list(a)}, the other {list(b)}")
    summary = summarise([a[key] - b[key] for key in shared], confidence)
    unpaired = (*(key for key in a if key not in b), *(key for key in b if key not in a))
    return PairedDifference(**asdict(summary), unpaired=unpaired)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points ``(learned, forgotten)`` that no other point dominates, in the given order.

    A point is dominated by one that learned at least as much and forgot at most as much, one of them strictly. Equal
    points do not dominate each other.

    Raises:
        ValueError: a coordinate is NaN.
    """
    if np.isnan(np.asarray(points, dtype=float)).any():
        raise ValueError(f"a point is not a number: {list(points)}")

    def dominates(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return p[0] >= q[0] and p[1] <= q[1] and p != q

    return [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
