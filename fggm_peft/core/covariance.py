"""The uncentered covariance ``C = E[x x^T]`` of a layer's inputs, as a low-rank sketch of constant size.

Index convention: ``i`` input features, ``r`` rank, ``n`` positions. A covariance is ``factor @ factor.mT + floor * I``.

A truncation keeps the largest eigenvalues and replaces the others by their mean, the maximum likelihood estimate of
probabilistic PCA (Tipping & Bishop, JRSS B 1999). It preserves the trace, and changes C by at most the first omitted
eigenvalue in the spectral norm. Frequent Directions has a better bound for sums of very many covariances, but its floor
is half of the first omitted eigenvalue: directions that the data hardly use would decay far too much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANK = 128
"""Default rank of a sketch. A width of at most twice the rank is stored exactly."""

Function = Callable[[Any], Any]
"""A function of eigenvalues, applied to a tensor of them and to a number."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A symmetric matrix ``vectors @ diag(energy) @ vectors.mT + floor * I``.

    Args:
        vectors: ``[f, r]`` with orthonormal columns.
        energy: ``[r]``, not negative.
        floor: not negative.
    """

    vectors: Tensor
    energy: Tensor
    floor: float

    def apply(self, x: Tensor, function: Function) -> Tensor:
        """``x @ function(C)`` for ``x`` ``[..., f]``, where the function is applied to the eigenvalues of ``C``."""
        rest = function(self.floor)
        difference = function(self.energy + self.floor) - rest
        flat = x.flatten(0, -2)
        return torch.addmm(flat, (flat @ self.vectors) * difference, self.vectors.mT, beta=rest).view(x.shape)

    def diagonal(self, function: Function) -> Tensor:
        """The diagonal of ``function(C)``, ``[f]``; positive for a positive function, also if one input dominates C."""
        squares = self.vectors.double().square()
        outside = (1 - squares.sum(1)).clamp(min=0) * function(self.floor)
        return (squares @ function(self.energy.double() + self.floor) + outside).to(self.vectors.dtype)


@dataclass(frozen=True, eq=False)
class Covariance:
    """``factor @ factor.mT + floor * I``, an estimate of ``E[x x^T]``.

    Args:
        factor: ``[i, r]``.
        floor: not negative.
    """

    factor: Tensor
    floor: float = 0.0

    @property
    def width(self) -> int:
        """``i``, the number of input features."""
        return len(self.factor)

    def dense(self) -> Tensor:
        """``[i, i]``."""
        return self.factor @ self.factor.mT + self.floor * torch.eye(self.width).to(self.factor)

    def diagonal(self) -> Tensor:
        """``E[x_j^2]`` of each feature, ``[i]`` float32."""
        return self.factor.float().square().sum(1) + self.floor

    def spectrum(self, features: Tensor | None = None) -> Spectrum:
        """The eigenvectors and eigenvalues, float32; with ``features`` ``[k]``, of the submatrix ``C[S, S]``."""
        vectors, energy = _principal(self.factor if features is None else self.factor[features])
        return Spectrum(vectors.float(), energy.float(), self.floor)

    def truncated(self, rank: int) -> Covariance:
        """The covariance with at most ``rank`` columns in its factor; exact if ``i`` is at most twice the rank."""
        if self.factor.shape[1] <= _kept(self.width, rank):
            return self
        leading = _leading(*_principal(self.factor), rank)
        return Covariance(leading.factor.to(self.factor.dtype), self.floor + leading.floor)

    def __add__(self, other: Covariance) -> Covariance:
        return Covariance(torch.cat([self.factor, other.factor.to(self.factor)], 1), self.floor + other.floor)

    def __mul__(self, factor: float) -> Covariance:
        return Covariance(self.factor * factor**0.5, self.floor * factor)

    def to(self, *args, **kwargs) -> Covariance:
        """The covariance on a device or in a dtype, as ``Tensor.to``."""
        return Covariance(self.factor.to(*args, **kwargs), self.floor)


def _principal(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``[i, r]`` and squared singular values ``[r]`` of a matrix, descending, float64."""
    wide = factor.cpu().double()  # small decompositions; a GPU would be waited for several times
    if wide.shape[1] > wide.shape[0]:
        energy, vectors = torch.linalg.eigh(wide @ wide.mT)
        return vectors.flip(1).to(factor.device), energy.flip(0).clamp(min=0).to(factor.device)
    # orthonormal also where singular values are zero, which eigenvectors of the Gram matrix do not give
    basis, triangle = torch.linalg.qr(wide)
    energy, vectors = torch.linalg.eigh(triangle @ triangle.mT)
    return (basis @ vectors.flip(1)).to(factor.device), energy.flip(0).clamp(min=0).to(factor.device)


def _kept(width: int, rank: int) -> int:
    """The number of eigenvectors that a covariance of this rank has: all if they need no more memory than a sum."""
    return width if width <= 2 * rank else rank


def _leading(vectors: Tensor, energy: Tensor, rank: int) -> Covariance:
    """The first eigenvectors ``[i, r]``, and the mean energy of the others as the floor."""
    width = len(vectors)
    limit = _kept(width, rank)
    rest = float(energy[limit:].sum()) / (width - limit) if limit < width else 0.0
    factor = vectors[:, :limit] * (energy[:limit] - rest).clamp(min=0).sqrt()
    return Covariance(factor.contiguous(), rest)  # as it is loaded from a file: sums round in the order of the memory


class CovarianceSum:
    """Sums ``x x^T`` over positions and keeps ``[i, 2 r]`` numbers.

    The sum is exact up to a width of ``2 r``. A wider one is multiplied by a random matrix as it is read, and recovered
    by the Nystroem method (Tropp et al., NeurIPS 2017, algorithm 3). Such sums add up over processes, and reading a
    position takes ``4 i r`` multiplications instead of a decomposition every few positions.
    """

    def __init__(self, width: int, rank: int = RANK, device: torch.device | str = "cpu"):
        self.rank = rank
        self.test_matrix: Tensor | None = None
        if width > 2 * rank:
            self.test_matrix = _test_matrix(width, 2 * rank, torch.device(device))
        self.product = torch.zeros(width, min(width, 2 * rank), device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.positions = 0

    def add_(self, x: Tensor) -> None:
        """Add the positions ``[n, i]``."""
        x = x.float()
        self.product.addmm_(x.mT, x if self.test_matrix is None else x @ self.test_matrix)
        self.energy += x.square().sum()
        self.positions += len(x)

    def covariance(self) -> Covariance:
        """The mean over positions; zero, with no column in its factor, if there are none."""
        if not self.positions:
            return Covariance(self.product.new_zeros(len(self.product), 0))
        mean = self.product.cpu().double() / self.positions
        if self.test_matrix is None:
            energy, vectors = torch.linalg.eigh((mean + mean.mT) / 2)
            vectors, energy = vectors.flip(1), energy.flip(0).clamp(min=0)
        else:
            vectors, energy = _nystroem(mean, self.test_matrix.cpu().double())
        result = _leading(vectors, energy, self.rank).to(torch.float32)
        # what the product does not see
        missing = float(self.energy) / self.positions - float(result.diagonal().double().sum())
        return Covariance(result.factor.to(self.product.device), result.floor + max(0.0, missing) / result.width)


@functools.lru_cache(maxsize=16)
def _test_matrix(width: int, columns: int, device: torch.device) -> Tensor:
    """A random matrix with orthonormal columns, the same on every process; all layers of a width share it."""
    generator = torch.Generator().manual_seed(width)
    return torch.linalg.qr(torch.randn(width, columns, generator=generator))[0].to(device)


def _nystroem(product: Tensor, test_matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors and eigenvalues of ``C``, from ``C @ test_matrix``, which was summed in float32."""
    shift = torch.finfo(torch.float32).eps * float(product.norm())
    if shift == 0:
        return test_matrix, product.new_zeros(product.shape[1])
    shifted = product + shift * test_matrix
    core = test_matrix.mT @ shifted
    energy, vectors = torch.linalg.eigh((core + core.mT) / 2)
    is_signal = energy > shift / 2
    factor = shifted @ (vectors[:, is_signal] * energy[is_signal].rsqrt())
    principal, energy = _principal(factor)
    return principal, (energy - shift).clamp(min=0)
