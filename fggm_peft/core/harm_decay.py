"""Harm decay: the proximal step of the penalty ``sigma / 2 * tr(V C V^T)`` on a delta ``V``.

``C = E[x x^T]`` is the covariance of a layer's inputs on data to retain, so ``tr(V C V^T) = E |V x|^2`` is the mean
squared change of the layer's output there. The step ``V <- V (I + sigma C)^-1`` is stable for every ``sigma``. It does
not change directions that these inputs do not use. It is decoupled from the gradient like the weight decay of AdamW
(Loshchilov & Hutter, ICLR 2019), which is the case ``C = I``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .covariance import Spectrum

STRENGTH = 80.0
"""Recommended strength: ``sigma`` divided by the learning rate."""


class Decay(ABC):
    """Harm decay of the values of one delta."""

    @abstractmethod
    def shrunk(self, values: Tensor, sigma: float) -> Tensor:
        """The values after one step, float32."""

    @abstractmethod
    def harm(self, values: Tensor) -> Tensor:
        """``tr(V C V^T)``, the mean squared change of the layer's output."""


@dataclass(frozen=True, eq=False)
class SpectralDecay(Decay):
    """The last dimension of the values is ``k`` input features, whose covariance is ``[k, k]``."""

    spectrum: Spectrum

    def shrunk(self, values, sigma):
        return self.spectrum.apply(values.float(), lambda energy: 1 / (1 + sigma * energy))

    def harm(self, values):
        return (self.spectrum.apply(values.float(), lambda energy: energy) * values.float()).sum()


@dataclass(frozen=True, eq=False)
class DiagonalDecay(Decay):
    """Each value is one weight entry. Correlations between input features are ignored.

    Args:
        energy: ``E[x_j^2]`` of the input feature of each value, in the shape of the values.
    """

    energy: Tensor

    def shrunk(self, values, sigma):
        return values.float() / (1 + sigma * self.energy)

    def harm(self, values):
        return (values.float().square() * self.energy).sum()


RIDGE = 3.2
"""``lambda`` of gain under decay, in the unit of the covariance."""


def _inverse(energy: Any) -> Any:
    return 1 / (RIDGE + energy)


@dataclass(frozen=True, eq=False)
class InputMetric:
    """Maps the inputs of a layer so that its squared gradients are gains under decay.

    Under harm decay the best delta for a gradient ``G`` is ``-G M`` with ``M = (lambda I + C)^-1``, and its gain is
    ``tr(G M G^T) / 2``. Row ``r`` contributes ``g_r^T M g_r``, the squared gradient for inputs ``x M^(1/2)``. Removing
    column ``j`` costs ``|(G M)_j|^2 / M_jj``, as in Optimal Brain Surgeon (Hassibi & Stork, 1992): the squared gradient
    for inputs ``x M``, divided by ``M_jj``.

    Args:
        spectrum: of ``C`` ``[i, i]``.
        of_columns: whether the units are columns.
    """

    spectrum: Spectrum
    of_columns: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Mapped inputs ``[..., i]``, float32."""
        function = _inverse if self.of_columns else lambda energy: _inverse(energy) ** 0.5
        with torch.autocast(x.device.type, enabled=False):
            return self.spectrum.apply(x.float(), function)

    def divisor(self) -> Tensor:
        """``M_jj`` ``[i]`` for columns, otherwise 1."""
        diagonal = self.spectrum.diagonal(_inverse)
        return diagonal if self.of_columns else diagonal.new_ones(())
