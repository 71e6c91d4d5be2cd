"""Criteria: scores that rank the units of a weight. A criterion is one short function of collected statistics.

``F`` is the Fisher information of a unit: of the task's data, or of a reference, which represents what the model should
keep. It is the sum over the ``c`` entries of the unit, so ``F / c`` is their mean. A threshold of global scope ranks by
score per entry; the ratios are therefore ratios of means, times ``c``, which is constant within one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .granularity import Granularity, Shape, UnitKind
from .harm_decay import InputMetric
from .registry import Registry
from .statistics import STATISTICS

FLOOR = 0.01
"""Added to a divisor, as a share of its mean, so that no ratio is infinite."""


@dataclass(frozen=True)
class Quantities:
    """The input of a criterion, for one weight.

    Args:
        granularity: kind of unit.
        shape: ``(o, i)``.
        weight: returns the base weight ``[o, i]``, dequantized if necessary.
        generator: seeded for this weight, on the CPU.
        task: the statistics of the task's data that the criterion names, float32 (see ``statistics``).
        reference: those of the reference.
        reference_mean: for each of them its mean over entries: of this weight or, with a threshold of global scope, of
            all weights.
        metric: of the layer's inputs, if the criterion uses their covariance.
    """

    granularity: Granularity
    shape: Shape
    weight: Callable[[], Tensor]
    generator: torch.Generator
    task: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    reference_mean: Mapping[str, float] = field(default_factory=dict)
    metric: InputMetric | None = None

    @property
    def entries(self) -> int:
        """``c``: the number of entries of a unit."""
        return self.granularity.parameters_per_unit(self.shape)


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Args:
        score: quantities -> ``[units]``, finite and not negative; the units with the highest scores are selected.
        task: names of the statistics of the task's data that it uses (``statistics.STATISTICS``).
        reference: names of the statistics of a reference that it uses.
        weight_dim: 0 if it ranks rows only, 1 if it ranks columns only, None if it ranks units of any granularity.
        uses_covariance: whether it uses the covariance of the layer's inputs on data to retain, for rows and columns.
    """

    score: Callable[[Quantities], Tensor]
    task: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    weight_dim: int | None = None
    uses_covariance: bool = False

    def __post_init__(self) -> None:
        for name in (*self.task, *self.reference):
            STATISTICS[name]
        if self.reference and not self.task:
            raise ValueError("a criterion that uses a reference must use the task's data too")

    def supports(self, granularity: UnitKind) -> bool:
        """Whether it can rank units of this granularity."""
        if self.uses_covariance and not granularity.is_slice:
            return False
        return self.weight_dim is None or self.weight_dim == granularity.weight_dim

    @property
    def needs_data(self) -> bool:
        """Whether an adapter starts empty until ``select_parameters`` has read data."""
        return bool(self.task)


CRITERIA: Registry[Criterion] = Registry("criterion", make=Criterion)
_MOMENT = ("input_second_moment",)


@CRITERIA.register("fisher", task=("fisher",))
def _fisher(q: Quantities) -> Tensor:
    """F (FGGM equation 3, arXiv 2601.18261)."""
    return q.task["fisher"]


@CRITERIA.register("gain_per_harm", task=("fisher",), reference=("fisher",))
def _gain_per_harm(q: Quantities) -> Tensor:
    """``sqrt(F) / (F_ref + eps)`` of the mean entry.

    An entry that AdamW moves by d gains about ``|g| d`` on the task, with ``E g^2 = F``, and costs about
    ``F_ref d^2 / 2`` on the reference. Both are in nats, so that entries of different weights compare.
    """
    return q.entries * (q.task["fisher"] / q.entries).sqrt() / _harm(q)


@CRITERIA.register("fisher_ratio", task=("fisher",), reference=("fisher",))
def _fisher_ratio(q: Quantities) -> Tensor:
    """``F / (F_ref + eps)``: the gradient ratio of GRIN, the domain-related Fisher information of FisherTune."""
    return q.task["fisher"] / _harm(q)


def _harm(q: Quantities) -> Tensor:
    return _floored(q.reference["fisher"] / q.entries, q.reference_mean["fisher"])


def _floored(values: Tensor, mean: float) -> Tensor:
    """``values + eps``, with eps 1 % of their mean; 1 if the mean is 0, so that only the task decides."""
    return values + FLOOR * mean if mean > 0 else torch.ones_like(values)


@CRITERIA.register("gain_under_decay", task=("fisher_under_decay",), uses_covariance=True)
def _gain_under_decay(q: Quantities) -> Tensor:
    """What the unit contributes to the task if harm decay limits the delta (``harm_decay.InputMetric``)."""
    assert q.metric is not None
    return q.task["fisher_under_decay"] / q.metric.divisor()


@CRITERIA.register("input_ratio", task=_MOMENT, reference=_MOMENT, weight_dim=1)
def _input_ratio(q: Quantities) -> Tensor:
    """``sqrt(E x^2) / (E x_ref^2 + eps)``: ``gain_per_harm`` from a layer's inputs only.

    On the reference, a column that moves by d changes the output by ``d x_i``. Inputs do not show how much one layer
    matters against another, so both moments are divided by the layer's own mean on the reference.
    """
    reference = q.reference["input_second_moment"]
    mean = float(reference.mean())
    return q.entries * (q.task["input_second_moment"] * (mean or 1.0)).sqrt() / _floored(reference, mean)


@CRITERIA.register("ssu", task=_MOMENT, reference=_MOMENT, weight_dim=1)
def _ssu(q: Quantities) -> Tensor:
    """The columns that the reference uses least, by ``sum_o |W_oj| sqrt(E x_ref_j^2)`` (SSU, arXiv 2512.04844).

    The importance of a weight is that of Wanda (arXiv 2306.11695). The authors' code uses ``|W_j|_2 E x_ref_j^2``.
    """
    norm = q.reference["input_second_moment"].sqrt()
    return _least_important(q, q.granularity.reduce(q.weight().abs().float()).to(norm.device) * norm)


@CRITERIA.register("ssu_inputs", task=_MOMENT, reference=_MOMENT, weight_dim=1)
def _ssu_inputs(q: Quantities) -> Tensor:
    """The columns that the reference uses least, by ``E x_ref_j^2``: ``ssu`` without the weight."""
    return _least_important(q, q.reference["input_second_moment"])


def _least_important(q: Quantities, importance: Tensor) -> Tensor:
    """High for columns whose importance is low, relative to the layer's mean. The task's data has no influence."""
    mean = float(importance.mean())
    return q.entries * (mean or 1.0) / _floored(importance, mean)


@CRITERIA.register("random")
def _random(q: Quantities) -> Tensor:
    # (0, 1], because a unit whose score is 0 is never selected
    return 1 - torch.rand(q.granularity.units(q.shape), generator=q.generator)


@CRITERIA.register("weight_magnitude")
def _weight_magnitude(q: Quantities) -> Tensor:
    return q.granularity.reduce(q.weight().abs().float())
