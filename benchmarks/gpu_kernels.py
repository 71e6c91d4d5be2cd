"""Each Triton kernel against PyTorch's operators, on a CUDA device.

All implementations of an operation are compared with each other, and then timed in turns. The results determine the
switch points in fggm_peft/core/kernels.py: the density up to which one dot product per entry is the fastest, and the
width up to which a gathered product is the fastest.

python benchmarks/gpu_kernels.py [--quick] [--repeats N]
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from common import interleaved, ratios, show, write
from torch import Tensor

from fggm_peft.core import kernels, sampled
from fggm_peft.core.granularity import Granularity, granularity_from

CALLS = 20  # timed together, which hides the launch time
PYTORCH = "PyTorch"  # the implementation without Triton


def support(total: int, density: float, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randperm(total)[: round(density * total)].sort().values.to(device, torch.int32)


def scatter(x: Tensor, g: Tensor, density: float) -> dict[str, Callable[[], Tensor]]:
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


def sampled_product(x: Tensor, g: Tensor, density: float) -> dict[str, Callable[[], Tensor]]:
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


def gathered_rows(x: Tensor, g: Tensor, density: float) -> dict[str, Callable[[], Tensor]]:
    """Selected rows of ``g.mT @ x``; the difference to the product alone is the cost of gathering."""
    indices = support(g.shape[1], density, str(x.device))
    chosen = g.index_select(1, indices)
    return {
        PYTORCH: lambda: g.index_select(1, indices).mT @ x,
        "product alone": lambda: chosen.mT @ x,
        "Triton": lambda: kernels.gathered_product(g, x, indices),
    }


def gathered_columns(x: Tensor, g: Tensor, density: float) -> dict[str, Callable[[], Tensor]]:
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


def check(ways: dict[str, Callable[[], Tensor]], tolerance: float = 2e-2) -> None:
    """Compare all implementations. Also warms up: Triton compiles and tunes its kernels."""
    results = {name: way().double().clone() for name, way in ways.items()}
    expected = results.pop(PYTORCH)
    for name, result in results.items():
        error = float((result - expected).norm() / expected.norm())
        if not error < tolerance:
            raise ValueError(f"{name} differs from {PYTORCH} by {error:.2g}: a kernel is wrong on this device")


def timed(way: Callable[[], Tensor]) -> Callable[[], float]:
    """Seconds of one call on the device."""

    def call() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / CALLS

    return call


def measure(quick: bool, repeats: int) -> dict[str, dict]:
    shapes = [(2048, 1024, 4096)] if quick else [(2048, 1024, 4096), (2048, 4096, 1024), (8192, 4096, 4096)]
    results = {}
    for n, o, i in shapes:
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            x, g = torch.randn(n, i, device="cuda", dtype=dtype), torch.randn(n, o, device="cuda", dtype=dtype)
            for name, (compared, densities) in COMPARED.items():
                for density in densities[::2] if quick else densities:
                    ways = compared(x, g, density)
                    check(ways)
                    title = f"{name}, [{o}, {i}], {n} positions, {str(dtype).removeprefix('torch.')}, {density:.1%}"
                    seconds = interleaved({key: timed(way) for key, way in ways.items()}, repeats)
                    results[title] = ratios(seconds, PYTORCH)
                    show(title, results[title])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, few densities; writes nothing")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "This benchmark requires a CUDA device, and torch finds none. On a CPU, kernels only run in an interpreter."
        )
    results = measure(arguments.quick, 3 if arguments.quick else arguments.repeats)
    if not arguments.quick:
        print("written to", write("gpu_kernels", results))


if __name__ == "__main__":
    main()
