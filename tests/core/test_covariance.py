"""Sketches of input covariances, compared with dense float64 covariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fggm_peft.core.covariance import Covariance, CovarianceSum


def features(positions: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inputs whose spectrum decays as 1 / k, with a common direction."""
    generator = torch.Generator().manual_seed(seed)
    scales = 1 / torch.arange(1, width + 1).double()
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    x = torch.randn(positions, width, generator=generator, dtype=torch.float64) * scales @ rotation
    return (x + torch.randn(width, generator=generator, dtype=torch.float64)).to(dtype)


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.double().mT @ x.double() / max(1, len(x))


def exact(matrix: torch.Tensor) -> Covariance:
    energy, vectors = torch.linalg.eigh(matrix)
    return Covariance(vectors * energy.clamp(min=0).sqrt())


def error(covariance: Covariance, matrix: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(covariance.dense().double() - matrix, 2))


def sketch(x: torch.Tensor, rank: int) -> Covariance:
    total = CovarianceSum(x.shape[1], rank)
    for part in x.split(7):
        total.add_(part)
    return total.covariance()


@pytest.mark.parametrize("positions", [0, 1, 5, 100])
def test_a_width_of_at_most_twice_the_rank_is_exact(positions):
    x = features(positions, 16)
    torch.testing.assert_close(sketch(x, rank=8).dense().double(), dense(x), atol=1e-5, rtol=1e-5)


def test_fewer_positions_than_the_rank_are_exact():
    x = features(6, 64)
    torch.testing.assert_close(sketch(x, rank=8).dense().double(), dense(x), atol=1e-3, rtol=1e-3)


def test_constant_inputs_have_rank_one():
    x = torch.full((50, 64), 2.0)
    torch.testing.assert_close(sketch(x, rank=4).dense(), torch.full((64, 64), 4.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_sketch_is_within_its_bound(dtype):
    """Tropp et al., theorem 4.1 with 2 r columns, then a truncation."""
    x = features(300, 96, dtype=dtype)
    matrix = dense(x)
    energy = torch.linalg.eigvalsh(matrix).flip(0)
    assert error(sketch(x, rank=12), matrix) < (1 + 12 / 11) * energy[12:].sum() + energy[12]
    assert float(sketch(x, rank=12).diagonal().sum()) == pytest.approx(float(matrix.trace()), rel=1e-3)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sums_of_any_number_of_tasks_keep_the_trace_the_bound_and_the_size(tasks, rank, seed):
    """Each truncation may add its first omitted eigenvalue to the error."""
    matrices = [dense(features(20, 24, seed + task)) for task in range(tasks)]
    total, bound = Covariance(torch.zeros(24, 0, dtype=torch.float64)), 0.0
    for matrix in matrices:
        whole = total + exact(matrix)
        bound += float(torch.linalg.svdvals(whole.factor)[rank].square())
        total = whole.truncated(rank)
    matrix = torch.stack(matrices).sum(0)
    assert error(total, matrix) <= bound * (1 + 1e-9)
    assert float(total.diagonal().double().sum()) == pytest.approx(float(matrix.trace()), rel=1e-5)
    assert total.factor.shape[1] <= rank


def test_scaling_and_diagonal():
    covariance = Covariance(features(5, 8).mT.contiguous(), floor=0.5)
    torch.testing.assert_close((covariance * 3).dense(), 3 * covariance.dense())
    torch.testing.assert_close(covariance.diagonal(), covariance.dense().diagonal())


@pytest.mark.parametrize("selected", [None, [0, 3, 4], list(range(10))])
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_functions_of_the_spectrum(selected, floor):
    covariance = Covariance(features(4, 10, dtype=torch.float64).mT.contiguous(), floor)
    indices = None if selected is None else torch.tensor(selected)
    spectrum = covariance.spectrum(indices)
    matrix = covariance.dense() if indices is None else covariance.dense()[indices][:, indices]
    x = torch.randn(3, 2, len(matrix))
    inverse = torch.linalg.inv(torch.eye(len(matrix)).double() + 2 * matrix)
    torch.testing.assert_close(
        spectrum.apply(x, lambda w: 1 / (1 + 2 * w)).double(), x.double() @ inverse, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        spectrum.diagonal(lambda w: 1 / (1 + 2 * w)).double(), inverse.diagonal(), atol=1e-5, rtol=1e-4
    )
