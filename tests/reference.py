"""Reference implementations of the library's computations: dense, float64 and slow. The package never imports this."""

from __future__ import annotations

import copy
from fractions import Fraction

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest relative error (Frobenius norm) allowed for sums of a few dozen products."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|``; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).norm())
    return error / max(float(expected.norm()), 1e-30) if error else 0.0


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Supports: one line for each granularity ---------------------------------------------------------

KINDS = ("row", "column", "element")
"""The granularities without arguments, which most tests run with. tests/core/test_blocks.py has the others."""


def units(name: str, shape: tuple[int, int]) -> int:
    return {"row": shape[0], "column": shape[1], "element": shape[0] * shape[1]}[name]


def mask(name: str, shape: tuple[int, int], indices: Tensor) -> Tensor:
    """``[o, i]``, True for entries in the support."""
    result = torch.zeros(shape, dtype=torch.bool)
    for index in indices.tolist():
        if name == "row":
            result[index, :] = True
        elif name == "column":
            result[:, index] = True
        elif name == "element":
            result[index // shape[1], index % shape[1]] = True
        else:
            raise KeyError(f"no reference for granularity {name!r}: add it here")
    return result


def dense_delta(name: str, shape: tuple[int, int], indices: Tensor, values: Tensor) -> Tensor:
    """``[o, i]`` float64; differentiable in ``values``. Values are the masked entries in the order of the weight."""
    return torch.zeros(shape, dtype=torch.float64).masked_scatter(mask(name, shape, indices), values.double())


def unit_scores(name: str, squares: Tensor) -> Tensor:
    """Sum ``[..., o, i]`` to ``[..., units]``."""
    return {"row": squares.sum(-1), "column": squares.sum(-2), "element": squares.flatten(-2)}[name]


# Products ----------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: list[tuple]) -> Tensor:
    """``x @ (weight + sum of scale * delta).T + bias``; a delta is (granularity name, indices, values, scale)."""
    total = weight.double()
    for name, indices, values, scale in deltas:
        total = total + scale * dense_delta(name, tuple(weight.shape), indices, values)
    y = x.double() @ total.T
    return y if bias is None else y + bias.double()


def stored(layer: torch.nn.Module, matrix: Tensor) -> Tensor:
    """A matrix ``[o, i]`` in the shape and orientation in which the layer stores its weight."""
    return matrix.T if isinstance(layer, Conv1D) else matrix.view(layer.weight.shape)


def layer_output(layer: torch.nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """The layer's own forward in float64, with ``delta`` ``[o, i]`` on its weight."""
    twin = copy.deepcopy(layer).double().requires_grad_(False)
    parameters = {"weight": twin.weight + stored(layer, delta)}
    return functional_call(twin, parameters, (x.double() if x.is_floating_point() else x,))


# Per-sample gradients ----------------------------------------------------------------------------


def per_sample_gradients(x: Tensor, g: Tensor) -> Tensor:
    """``[b, o, i]`` float64 from ``x`` ``[b, t, i]`` and ``g`` ``[b, t, o]``, one position at a time."""
    result = torch.zeros(len(x), g.shape[2], x.shape[2], dtype=torch.float64)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            result[b] += torch.outer(g[b, t].double(), x[b, t].double())
    return result


def per_sample_weight_gradients(layer: torch.nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """``[b, *weight.shape]`` float64: autograd of the layer itself, one sample at a time."""
    twin = copy.deepcopy(layer).double()
    gradients = []
    for sample, gradient in zip(x, g, strict=True):
        sample = sample.double() if sample.is_floating_point() else sample
        output = twin(sample[None])
        gradients += torch.autograd.grad(output, twin.weight, gradient.double()[None])
    return torch.stack(gradients)


# Threshold policies, by sorting ------------------------------------------------------------------


def top_k(scores: list[float], k: int) -> list[int]:
    """Indices of the ``k`` highest positive scores; ties prefer the lower index."""
    order = sorted((i for i, s in enumerate(scores) if s > 0), key=lambda i: (-scores[i], i))
    return sorted(order[:k])


def ranked(scores: list[list[float]], costs: list[int]) -> list[tuple[Fraction, int, int]]:
    """(score per parameter, weight, index) of every positive score, highest first; ties keep their order."""
    entries = [
        (Fraction(s) / c, w, i) for w, (v, c) in enumerate(zip(scores, costs, strict=True)) for i, s in enumerate(v)
    ]
    return sorted((e for e in entries if e[0] > 0), key=lambda e: (-e[0], e[1], e[2]))


def by_weight(chosen: list[tuple], weights: int) -> list[list[int]]:
    return [sorted(i for _, w, i in chosen if w == weight) for weight in range(weights)]


def within_budget(scores: list[list[float]], costs: list[int], budget: int) -> list[list[int]]:
    """Select from the highest score down; stop after the first rank with a unit that exceeds the budget."""
    chosen, left, cut = [], budget, None
    for rank, weight, index in ranked(scores, costs):
        if cut is not None and rank < cut:
            break
        if costs[weight] <= left:
            chosen.append((rank, weight, index))
            left -= costs[weight]
        else:
            cut = rank
    return by_weight(chosen, len(scores))


def within_bounds(scores, costs, budget: int, most: int | None) -> list[list[int]]:
    """Spend the budget over all weights. Only the ``most`` best units of a weight may be selected."""
    best = [set(top_k(v, len(v) if most is None else most)) for v in scores]
    scores = [[s if i in allowed else 0.0 for i, s in enumerate(v)] for v, allowed in zip(scores, best, strict=True)]
    return within_budget(scores, costs, budget)


def holding(scores: list[list[float]], costs: list[int], fraction: float) -> list[list[int]]:
    """The fewest best units whose scores sum to ``fraction`` of the total."""
    target = Fraction(fraction) * sum(Fraction(s) for v in scores for s in v) * (1 - Fraction(1, 10**9))
    chosen, total = [], Fraction(0)
    for entry in ranked(scores, costs):
        if total >= target:
            break
        chosen.append(entry)
        total += entry[0] * costs[entry[1]]
    return by_weight(chosen, len(scores))


# Criteria: float64, from dense statistics --------------------------------------------------------


def criterion_scores(name: str, granularity: str, q: dict[str, Tensor]) -> Tensor:
    """``[units]``.

    Args:
        q: ``[o, i]`` float64: "fisher" and "reference" (mean squared per-sample gradients), "batches" (mean squared
            gradients of batches), "gradient" (mean gradient), "weight"; ``[i]``: "input" and "reference input" (second
            moments).
    """

    def unit(matrix: Tensor) -> Tensor:
        return unit_scores(granularity, matrix)

    def least(importance: Tensor) -> Tensor:
        return entries / (importance / importance.mean() + 0.01)

    entries = q["weight"].numel() // len(unit(q["weight"]))
    harm = unit(q["reference"]) / entries + 0.01 * q["reference"].mean()
    return {
        "fisher": lambda: unit(q["fisher"]),
        "gain_per_harm": lambda: entries * (unit(q["fisher"]) / entries).sqrt() / harm,
        "fisher_ratio": lambda: unit(q["fisher"]) / harm,
        # the covariance is 0.4 I and the ridge 3.2, so that M = I / 3.6
        "gain_under_decay": lambda: unit(q["fisher"]) / (1 / 3.6 if granularity == "column" else 1),
        "input_ratio": lambda: (
            entries
            * (q["input"] * q["reference input"].mean()).sqrt()
            / (q["reference input"] + 0.01 * q["reference input"].mean())
        ),
        "ssu": lambda: least(q["weight"].abs().sum(0) * q["reference input"].sqrt()),
        "ssu_inputs": lambda: least(q["reference input"]),
        "weight_magnitude": lambda: unit(q["weight"].abs()),
    }[name]()


def gain_under_decay(gradient: Tensor, covariance: Tensor, granularity: str) -> Tensor:
    """What each row or column of one sample's gradient ``[o, i]`` gains under harm decay, ``[units]`` float64."""
    metric = torch.linalg.inv(3.2 * torch.eye(gradient.shape[1]).double() + covariance)
    if granularity == "column":
        return (gradient @ metric).square().sum(0) / metric.diagonal()
    return (gradient @ metric * gradient).sum(1)


def above_mean(scores: list[list[float]], costs: list[int], k: float) -> list[list[int]]:
    """Units whose score per parameter exceeds mean + k * std over all units."""
    flat = torch.tensor([s / c for v, c in zip(scores, costs, strict=True) for s in v], dtype=torch.float64)
    bound = max(0.0, float(flat.mean() + k * flat.std(unbiased=False)))
    return [[i for i, s in enumerate(v) if s / c > bound] for v, c in zip(scores, costs, strict=True)]
