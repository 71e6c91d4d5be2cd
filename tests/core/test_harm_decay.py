"""One step of harm decay, compared with the dense float64 formula."""

from __future__ import annotations

import pytest
import torch

from fggm_peft.core.covariance import Covariance
from fggm_peft.core.granularity import Columns, Elements, Rows
from fggm_peft.core.harm_decay import RIDGE, InputMetric

SHAPE = (5, 8)


def covariance(floor: float = 0.2) -> Covariance:
    return Covariance(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), floor)


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_columns_decay_by_their_own_covariance(sigma, floor):
    indices = torch.tensor([1, 4, 6], dtype=torch.int32)
    values = torch.randn(5, 3)
    own = covariance(floor).dense().double()[indices.long()][:, indices.long()]
    expected = values.double() @ torch.linalg.inv(torch.eye(3).double() + sigma * own)
    decay = Columns().decay(covariance(floor), indices, SHAPE)
    torch.testing.assert_close(decay.shrunk(values, sigma).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        float(decay.harm(values)), float((values.double() @ own @ values.double().mT).trace()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e4])
def test_rows_decay_by_the_whole_covariance(sigma):
    values = torch.randn(2, 8)
    expected = values.double() @ torch.linalg.inv(torch.eye(8).double() + sigma * covariance().dense().double())
    shrunk = Rows().decay(covariance(), torch.tensor([0, 3]), SHAPE).shrunk(values, sigma)
    torch.testing.assert_close(shrunk.double(), expected, atol=1e-5, rtol=1e-4)


def test_elements_decay_by_the_diagonal():
    indices, values = torch.tensor([3, 9, 39]), torch.tensor([1.0, -2.0, 3.0])
    shrunk = Elements().decay(covariance(), indices, SHAPE).shrunk(values, 2.0)
    torch.testing.assert_close(shrunk, values / (1 + 2 * covariance().diagonal()[indices % 8]))


def test_the_step_is_the_minimum_of_the_proximal_problem():
    start = torch.randn(4, 8).double()
    own = covariance().dense().double()
    values = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (values - start).square().sum() + 0.35 * (values @ own @ values.mT).trace()
        loss.backward()
        return loss

    optimizer.step(closure)
    shrunk = Rows().decay(covariance(), torch.arange(4), (4, 8)).shrunk(start, 0.7)
    torch.testing.assert_close(shrunk, values.detach().float(), atol=1e-4, rtol=1e-4)


def test_a_direction_without_inputs_does_not_decay():
    quiet = torch.linalg.svd(covariance(0.0).factor, full_matrices=True)[0][:, -1]
    shrunk = Rows().decay(covariance(0.0), torch.tensor([0]), SHAPE).shrunk(quiet[None], 1e6)
    torch.testing.assert_close(shrunk[0], quiet, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("energy", [1e2, 1e6, 1e10])
def test_an_input_that_dominates_does_not_break_the_metric(energy):
    """Attention sinks have inputs hundreds of times larger than the rest."""
    factor = covariance().factor.clone()
    factor[2, 0] = energy**0.5
    metric = InputMetric(Covariance(factor, 0.01).spectrum(), of_columns=True)
    matrix = Covariance(factor.double(), 0.01).dense() + RIDGE * torch.eye(8).double()
    divisor = metric.divisor()
    assert (divisor > 0).all()
    torch.testing.assert_close(divisor.double(), torch.linalg.inv(matrix).diagonal(), atol=2e-6, rtol=1e-3)


@pytest.mark.parametrize("of_columns", [True, False])
def test_gain_under_decay_is_what_the_definition_gives(of_columns):
    """Rows: ``g_r^T M g_r``. Columns: the loss of gain if the column must not change, times 2."""
    gradient = torch.randn(5, 8).double()
    metric_matrix = torch.linalg.inv(RIDGE * torch.eye(8).double() + covariance().dense().double())
    metric = InputMetric(covariance().spectrum(), of_columns)
    # one position, so that the gradient is g x^T with x mapped: use rows of an identity as inputs
    mapped = metric(torch.eye(8)).double()
    scores = (gradient @ mapped).square().sum(0 if of_columns else 1) / metric.divisor().double()
    if of_columns:
        gain = (gradient @ metric_matrix @ gradient.mT).trace()
        for column in range(8):
            rest = [j for j in range(8) if j != column]
            inner = torch.linalg.inv(metric_matrix)[rest][:, rest]
            without = (gradient[:, rest] @ torch.linalg.inv(inner) @ gradient[:, rest].mT).trace()
            torch.testing.assert_close(scores[column], gain - without, atol=1e-3, rtol=1e-3)
    else:
        torch.testing.assert_close(scores, (gradient @ metric_matrix * gradient).sum(1), atol=1e-3, rtol=1e-3)
