"""Forward and backward of a layer on rows or columns: two products without a copy of the weight, or one with a copy.

``core.linear.pays_to_split`` is based on where both cost the same.

python benchmarks/forms.py [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable
from functools import partial

import torch
from common import interleaved, ratios, show, write
from torch import Tensor

from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.linear import effective_linear, pays_to_split
from fggm_peft.core.weight_delta import WeightDelta

SHAPES = [(512, 512), (1024, 1024), (4096, 1536)]
POSITIONS = [32, 128, 256, 512]
DENSITIES = [0.01, 0.05, 0.3]
TOGETHER = 2**27  # bytes of all layers in one call
COPIED, SPLIT = "copied", "split"


def measure(shape: tuple[int, int], positions: int, density: float, name: str, dtype: torch.dtype) -> dict[str, float]:
    """Time of the split form over that of the copying form, and the loss from the choice between them."""
    generator = torch.Generator().manual_seed(0)
    kind = granularity_from(name)
    units = kind.units(shape)
    indices = torch.randperm(units, generator=generator)[: max(1, round(units * density))].sort().values.int()
    values = torch.randn(kind.values_shape(shape, len(indices)), generator=generator) * 1e-3
    weight = torch.randn(shape, generator=generator).to(dtype)
    # many layers, because a weight of a real model is in no cache when its layer runs
    count = math.ceil(TOGETHER / (weight.nbytes + values.nbytes))
    deltas = [WeightDelta(kind, indices, torch.nn.Parameter(values.clone())) for _ in range(count)]
    layers = [(weight.clone(), delta) for delta in deltas]
    x = torch.randn(positions, shape[1], generator=generator).to(dtype).requires_grad_()
    g = torch.randn(positions, shape[0], generator=generator).to(dtype)

    def model(product: Callable[[Tensor, WeightDelta], Tensor]) -> None:
        outputs = [product(weight, delta) for weight, delta in layers]
        for y, (_, delta) in zip(reversed(outputs), reversed(layers), strict=True):
            torch.autograd.grad(y, (x, delta.values), g)

    calls = {
        COPIED: partial(model, lambda weight, delta: effective_linear(x, weight.clone, None, [delta])),
        SPLIT: partial(model, lambda weight, delta: effective_linear(x, lambda: weight, None, [delta], True)),
    }
    split = ratios(interleaved(calls, 3), COPIED)[SPLIT]["ratio_min"]
    chosen = split if pays_to_split(deltas[0], shape, positions) else 1.0
    return {"split_over_copied": split, "chosen_over_copied": chosen, "chosen_over_best": chosen / min(split, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only one shape and dtype")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = list(itertools.product((torch.float32, torch.bfloat16), SHAPES))
    results = {}
    for dtype, shape in settings[:1] if arguments.quick else settings:
        rows = {
            f"{name}, {positions} positions, {density:.0%}": measure(shape, positions, density, name, dtype)
            for name, positions, density in itertools.product(("row", "column"), POSITIONS, DENSITIES)
        }
        title = f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}"
        show(title, rows)
        results[title] = rows
    if not arguments.quick:
        print("written to", write("forms", results))


if __name__ == "__main__":
    main()
