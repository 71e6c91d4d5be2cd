"""The Triton kernels: whole training steps with and without them, and each kernel against PyTorch's operators.

The second table determines the switch points in fggm_peft/core/kernels.py: the density up to which one dot product per
entry is the fastest, and the width up to which a gathered product is the fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE
from suite.cases import Setting
from suite.measurements import Step, base_of, batch_of, timed
from suite.methods import FGGM, METHODS, targeted_values
from torch import Tensor

from fggm_peft.core import kernels, sampled
from fggm_peft.core.granularity import Granularity, granularity_from

CALLS = 20  # timed together, which hides the launch time
PYTORCH = "PyTorch"  # the implementation without Triton
MODES = {PYTORCH: "0", "Triton where expected to be faster": "1", "Triton wherever possible": "always"}

Ways = dict[str, Callable[[], Tensor]]


# Whole steps --------------------------------------------------------------------------------------


def steps(setting: Setting, seconds: float) -> dict[str, dict[str, Any]]:
    """A training step of each granularity in each mode of the kernels."""
    base, batch = base_of(setting), batch_of(setting)
    values = round(targeted_values(base) * setting.density)
    tables = {}
    for method in FGGM:
        step = Step(METHODS[method](base, values), batch)

        def run(mode: str, step: Step = step) -> None:
            before = kernels.use_triton(mode)
            try:
                step()
            finally:
                kernels.use_triton(before)

        calls = {name: functools.partial(run, mode) for name, mode in MODES.items()}
        tables[f"kernels in a training step: {method}, {setting.text()}"] = timed(calls, PYTORCH, seconds)
    return tables


# Single operations --------------------------------------------------------------------------------


def support(total: int, density: float, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randperm(total)[: round(density * total)].sort().values.to(device, torch.int32)


def scatter(x: Tensor, g: Tensor, density: float) -> Ways:
    """``weight += delta`` for elements; the values are float32, as in training."""
    indices = support(g.shape[1] * x.shape[1], density, str(x.device))
    values = torch.randn(len(indices), device=x.device)
    weight = x.new_zeros(g.shape[1], x.shape[1])

    def by(add_: Callable) -> Callable[[], Tensor]:
        own = weight.clone()  # each implementation adds to a separate copy

        def way() -> Tensor:
            add_(own, indices, values, 1.0)
            return own

        return way

    return {
        PYTORCH: by(functools.partial(Granularity.add_, granularity_from("element"))),
        "Triton": by(kernels.add_elements_),
    }


def sampled_product(x: Tensor, g: Tensor, density: float) -> Ways:
    """Selected entries of ``g.mT @ x``."""
    from fggm_peft.core.triton import elements

    indices = support(g.shape[1] * x.shape[1], density, str(x.device))
    limit = sampled._SAMPLED_MAX_DENSITY.get(x.dtype, sampled._SAMPLED_MAX_DENSITY_16_BIT)
    rows, columns = indices // x.shape[1], indices % x.shape[1]
    ways = {
        "bags": lambda: sampled.bag_sampled_product(x, g, rows, columns),
        "chunks": lambda: sampled.dense_chunks(x, g, indices),
        "whole product": lambda: (g.mT @ x).view(-1).index_select(0, indices),
        "Triton, dots": lambda: elements.sampled_dots(x, g, indices),
        "Triton, tiles": lambda: elements.sampled_tiles(x, g, indices),
    }
    return {PYTORCH: ways.pop("chunks" if density > limit else "bags"), **ways}


def gathered_rows(x: Tensor, g: Tensor, density: float) -> Ways:
    """Selected rows of ``g.mT @ x``; the difference to the product alone is the cost of gathering."""
    indices = support(g.shape[1], density, str(x.device))
    chosen = g.index_select(1, indices)
    return {
        PYTORCH: lambda: g.index_select(1, indices).mT @ x,
        "product alone": lambda: chosen.mT @ x,
        "Triton": lambda: kernels.gathered_product(g, x, indices),
    }


def gathered_columns(x: Tensor, g: Tensor, density: float) -> Ways:
    """Selected columns of ``g.mT @ x``."""
    indices = support(x.shape[1], density, str(x.device))
    chosen = x.index_select(1, indices)
    return {
        PYTORCH: lambda: g.mT @ x.index_select(1, indices),
        "product alone": lambda: g.mT @ chosen,
        "Triton": lambda: kernels.gathered_product(x, g, indices, True),
    }


COMPARED = {
    "scatter": (scatter, (0.001, 0.01, 0.1, 0.3)),
    "sampled product": (sampled_product, (0.001, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3)),
    "gathered rows": (gathered_rows, (0.05, 0.3)),
    "gathered columns": (gathered_columns, (0.05, 0.3)),
}


def check(ways: Ways, tolerance: float = 2e-2) -> None:
    """Compare all implementations. Also warms up: Triton compiles and tunes its kernels."""
    results = {name: way().double().clone() for name, way in ways.items()}
    expected = results.pop(PYTORCH)
    for name, result in results.items():
        error = float((result - expected).norm() / expected.norm())
        if not error < tolerance:
            raise ValueError(f"{name} differs from {PYTORCH} by {error:.2g}: a kernel is wrong on this device")


def on_device(way: Callable[[], Tensor]) -> Callable[[], float]:
    """Seconds of one call on the device, without the launch."""

    def call() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / CALLS

    return call


def operations(n: int, o: int, i: int, name: str, dtype: torch.dtype, seconds: float) -> dict[str, dict[str, Any]]:
    """Each implementation of an operation on a weight ``[o, i]`` with ``n`` positions, at its densities.

    Raises:
        ValueError: two implementations differ.
    """
    x, g = torch.randn(n, i, device=DEVICE, dtype=dtype), torch.randn(n, o, device=DEVICE, dtype=dtype)
    compare, densities = COMPARED[name]
    tables = {}
    for density in densities:
        ways = compare(x, g, density)
        check(ways)
        title = f"{name}: [{o}, {i}], {n} positions, {str(dtype).removeprefix('torch.')}, {density:.1%}"
        tables[title] = timed({key: on_device(way) for key, way in ways.items()}, PYTORCH, seconds / len(densities))
    return tables
