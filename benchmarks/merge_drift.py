"""How a bfloat16 base changes over a thousand merges and unmerges, for FGGM, LoRA and SHiRA with equally large deltas.

The drift of all adapted weights is measured after 1, 10, 100 and 1000 cycles: the share of entries whose bits changed,
the largest difference over the standard deviation of its weight, and the norm of all differences over that of the
delta.

python benchmarks/merge_drift.py [--cycles N] [--hidden N]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import llama, show, write
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from tqdm.auto import tqdm

from fggm_peft import FGGMConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RELATIVE_DELTA = 0.01  # norm of each delta over the norm of its weight

METHODS = {
    "FGGM rows": FGGMConfig(criterion="random", granularity="row", density=0.1, init_weights=False),
    "FGGM columns": FGGMConfig(criterion="random", granularity="column", density=0.1, init_weights=False),
    "FGGM elements": FGGMConfig(criterion="random", granularity="element", density=0.1, init_weights=False),
    "LoRA": LoraConfig(target_modules=TARGETS, r=8, lora_alpha=8, init_lora_weights=False),
    "SHiRA": ShiraConfig(target_modules=TARGETS, r=8, init_weights=False),
}
SCALED = {"FGGM": "fggm_values", "LoRA": "lora_B", "SHiRA": "shira_weight"}  # parameters in which the delta is linear


def adapted(name: str, hidden: int) -> PeftModel:
    model = get_peft_model(llama(hidden, 2, torch.bfloat16), METHODS[name])
    for layer in layers(model):
        weight, delta = layer.get_base_layer().weight.detach(), layer.get_delta_weight("default").to_dense()
        factor = RELATIVE_DELTA * float(weight.float().norm() / delta.detach().float().norm())
        for key, parameter in layer.named_parameters():
            if key.startswith(SCALED[name.split()[0]]):
                parameter.data.mul_(factor)
    return model


def layers(model: PeftModel) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def weights(model: PeftModel) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach() for layer in layers(model)]


@torch.no_grad()
def drift(model: PeftModel, before: list[Tensor]) -> dict[str, float]:
    pairs = list(zip(weights(model), before, strict=True))
    changed = sum(int((now.view(torch.int16) != then.view(torch.int16)).sum()) for now, then in pairs)
    differences = [now.double() - then.double() for now, then in pairs]
    norm = sum(float(difference.square().sum()) for difference in differences) ** 0.5
    delta = sum(float((RELATIVE_DELTA * then.double()).square().sum()) for then in before) ** 0.5
    return {
        "changed": changed / sum(then.numel() for then in before),
        "largest_over_std": max(
            float(d.abs().max() / w.double().std()) for d, w in zip(differences, before, strict=True)
        ),
        "over_delta": norm / delta,
    }


def run(name: str, cycles: int, hidden: int) -> dict[str, Any]:
    model = adapted(name, hidden)
    before = [weight.clone() for weight in weights(model)]
    drifts, seconds = {}, 0.0
    for cycle in tqdm(range(1, cycles + 1), desc=name, disable=None):
        start = time.perf_counter()
        model.merge_adapter()
        model.unmerge_adapter()
        seconds += time.perf_counter() - start
        if cycle in (1, 10, 100, 1000, cycles):
            drifts[f"{cycle} cycles"] = drift(model, before)
    return {**drifts, "seconds_per_cycle": seconds / cycles}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=512)
    arguments = parser.parse_args()
    results = {name: run(name, arguments.cycles, arguments.hidden) for name in METHODS}
    last = {name: result[f"{arguments.cycles} cycles"] for name, result in results.items()}
    show(f"drift after {arguments.cycles} merges and unmerges, bfloat16", last)
    case = f"hidden {arguments.hidden} x 2 layers, bfloat16, delta {RELATIVE_DELTA:.0%} of the weight's norm"
    print(write("merge_drift", {case: results}))


if __name__ == "__main__":
    main()
