"""What a sequence of tasks is judged by, from the matrix of its scores; how runs over seeds and orders are compared.

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

Scores = NDArray[np.float64]
Value = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Measure:
    """A measure and its formula, as a report prints it.

    Args:
        compute: takes scores ``[T, T]`` and zero-shot scores ``[T]`` or None; gives None where nothing is defined.
        formula: in plain text.
    """

    compute: Callable[[ArrayLike, ArrayLike | None], Value]
    formula: str


def op(scores: ArrayLike) -> tuple[float, ...]:
    """``OP_t = mean_{j<=t} R[t,j]`` for every t: overall performance on the tasks seen so far (TRACE)."""
    matrix = checked_scores(scores)
    return tuple(_mean(matrix[t, : t + 1]) for t in range(len(matrix)))


def final_op(scores: ArrayLike) -> float:
    """``OP_T = mean_j R[T,j]``: overall performance after the last task. The figure that TRACE and FGGM print as OP."""
    return op(scores)[-1]


def mean_op(scores: ArrayLike) -> float:
    """``mean_t OP_t``: overall performance, averaged over the steps. Not ``OP_T``, with which it is easily confused."""
    return _mean(op(scores))


def diagonal_mean(scores: ArrayLike) -> float:
    """``mean_t R[t,t]``: what was learned, each task measured right after it."""
    return _mean(np.diagonal(checked_scores(scores)))


def backward_transfer(scores: ArrayLike) -> float | None:
    """``BWT_T = mean_{j<T} (R[T,j] - R[j,j])`` (Lopez-Paz and Ranzato 2017; TRACE); None for a single task.

    Negative where tasks were forgotten. The last task has nothing after it and does not count.
    """
    matrix = checked_scores(scores)
    return _mean((matrix[-1] - np.diagonal(matrix))[:-1]) if len(matrix) > 1 else None


def forgetting(scores: ArrayLike) -> float | None:
    """``mean_{j<T} (max_{j<=t<T} R[t,j] - R[T,j])`` (Chaudhry et al. 2018); None for a single task.

    Against the best a task ever was before the last one was trained, not against its score right after it: where
    tasks gained later, more is counted as forgotten than ``-BWT_T``. Negative if the last task helped the others.
    """
    matrix = checked_scores(scores)
    last = len(matrix) - 1
    return _mean([matrix[j:last, j].max() - matrix[last, j] for j in range(last)]) if last else None


def forward_transfer(scores: ArrayLike, zero_shot: ArrayLike | None = None) -> float | None:
    """``mean_{j>1} (R[j-1,j] - r0[j])``: how much the tasks before helped with one not yet trained.

    None for a single task, without zero-shot scores ``r0``, or where a task was not evaluated before it was trained.

    Raises:
        ValueError: as ``checked_scores``, or there is not one zero-shot score for each task.
    """
    matrix = checked_scores(scores)
    if zero_shot is None:
        return None
    start = np.asarray(zero_shot, dtype=np.float64)
    if start.shape != (len(matrix),) or np.isinf(start).any():
        raise ValueError(f"zero-shot scores must be one number for each of {len(matrix)} tasks, got {start.tolist()}")
    gains = np.diagonal(matrix, offset=1) - start[1:]
    return None if not len(gains) or np.isnan(gains).any() else _mean(gains)


def _mean(values: ArrayLike) -> float:
    return float(np.mean(np.asarray(values)))


MEASURES: dict[str, Measure] = {
    "final_op": Measure(lambda scores, _: final_op(scores), "OP_T = mean_j R[T,j]"),
    "op": Measure(lambda scores, _: op(scores), "OP_t = mean_{j<=t} R[t,j]"),
    "mean_op": Measure(lambda scores, _: mean_op(scores), "mean_t OP_t"),
    "diagonal_mean": Measure(lambda scores, _: diagonal_mean(scores), "mean_t R[t,t]"),
    "backward_transfer": Measure(lambda scores, _: backward_transfer(scores), "BWT_T = mean_{j<T} (R[T,j] - R[j,j])"),
    "forgetting": Measure(lambda scores, _: forgetting(scores), "mean_{j<T} (max_{j<=t<T} R[t,j] - R[T,j])"),
    "forward_transfer": Measure(forward_transfer, "mean_{j>1} (R[j-1,j] - r0[j])"),
}
"""Name to measure; a measure that is added here and to ``Measures`` is in every report."""


RESULT_NAMES = {
    "op": "final_op",
    "op_mean": "mean_op",
    "diagonal": "diagonal_mean",
    "bwt": "backward_transfer",
    "forgetting": "forgetting",
    "fwt": "forward_transfer",
}
"""Name in a result -> name of the measure."""


@dataclass(frozen=True)
class Measures:
    """All measures of one run; the formulas are in ``MEASURES`` under the same names."""

    final_op: float
    op: tuple[float, ...]
    mean_op: float
    diagonal_mean: float
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None

    @classmethod
    def of(cls, scores: ArrayLike, zero_shot: ArrayLike | None = None) -> Measures:
        """The measures of the scores ``[T, T]`` and, for the forward transfer, zero-shot scores ``[T]``.

        Raises:
            ValueError: as ``checked_scores`` and ``forward_transfer``.
        """
        values: dict[str, Any] = {name: measure.compute(scores, zero_shot) for name, measure in MEASURES.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "op": list(self.op)}


def checked_scores(scores: ArrayLike) -> Scores:
    """The scores as float64 ``[T, T]``.

    Raises:
        ValueError: they are not a square, or one on or below the diagonal is missing or infinite. Above the diagonal
            NaN stands for a task that was not evaluated before it was trained.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"scores must be a square [tasks, tasks], got the shape {list(matrix.shape)}; cut a run that is not "
            "finished to the tasks that are"
        )
    is_missing = ~np.isfinite(matrix) & ~(np.isnan(matrix) & np.triu(np.ones_like(matrix, dtype=bool), k=1))
    if is_missing.any():
        t, j = np.argwhere(is_missing)[0]
        raise ValueError(f"the score on task {j + 1} after task {t + 1} is {matrix[t, j]}; every measure needs it")
    return matrix


# --- over seeds and orders -----------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A figure over several runs.

    Args:
        mean: over the runs.
        std: sample standard deviation (n - 1); None for one run.
        n: number of runs.
        interval: confidence interval of the mean by Student's t; None for one run, of which there is none.
        confidence: of the interval.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float] | None
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and confidence interval of one figure of several runs.

    Raises:
        ValueError: there are no values, one is not finite, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not len(values) or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a summary needs at least one value and only finite ones, got {list(values)}")
    mean, n = _mean(values), len(values)
    if n == 1:
        return Summary(mean, None, n, None, confidence)
    from scipy.stats import t

    std = float(np.std(values, ddof=1))
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)
    return Summary(mean, std, n, (mean - half, mean + half), confidence)


@dataclass(frozen=True)
class PairedDifference:
    """How much one method is above another over the runs that both have.

    Args:
        difference: summary of ``a - b``, pair by pair.
        unpaired: keys of the runs that only one of them has; they do not count.
    """

    difference: Summary
    unpaired: tuple[Hashable, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out; never for one pair."""
        interval = self.difference.interval
        return interval is not None and not interval[0] <= 0 <= interval[1]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.difference.to_dict(),
            "is_clear": self.is_clear,
            "unpaired": [list(key) if isinstance(key, tuple) else key for key in self.unpaired],
        }


def paired_difference(
    a: Mapping[Hashable, float], b: Mapping[Hashable, float], confidence: float = 0.95
) -> PairedDifference:
    """The mean of ``a - b`` over runs with the same key, usually ``(seed, order)``, and its interval.

    Pairing takes out what seed and order do to both methods, which is often more than what sets them apart.

    Raises:
        ValueError: no key is in both.
    """
    shared = [key for key in a if key in b]
    if not shared:
        raise ValueError(f"no run to pair: one method has {list(a)}, the other {list(b)}")
    unpaired = (*(key for key in a if key not in b), *(key for key in b if key not in a))
    return PairedDifference(summarise([a[key] - b[key] for key in shared], confidence), unpaired)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points ``(learned, forgotten)`` that no other point beats, in the order given.

    A point is beaten by one that learned at least as much and forgot at most as much, one of the two strictly. Equal
    points do not beat each other.

    Raises:
        ValueError: a coordinate is NaN, which can be compared with nothing.
    """
    if any(math.isnan(value) for point in points for value in point):
        raise ValueError(f"a point is not a number: {list(points)}")

    def beats(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return p[0] >= q[0] and p[1] <= q[1] and p != q

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]
