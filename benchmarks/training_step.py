"""One optimizer step of FGGM against LoRA and SHiRA with as many trainable values, and full fine-tuning.

All are interleaved in one process; the ratio is over a frozen forward and backward of the same batch.
Memory is the peak over the step of what torch allocated on the CPU beyond what stood before it.

python benchmarks/training_step.py [--quick] [--repeats N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import batches, case_name, interleaved, llama, peak_mib, ratios, show, write
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

from fggm_peft import FGGMConfig


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def targeted_values(model: nn.Module) -> int:
    return sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")


def fggm(build: Callable, granularity: str, density: float) -> nn.Module:
    config = FGGMConfig(target_modules="all-linear", granularity=granularity, density=density, criterion="random")
    return get_peft_model(build(), config)


def lora(build: Callable, values: int) -> nn.Module:
    """The rank whose number of trainable values is nearest to ``values``."""
    one = trainable(get_peft_model(build(), LoraConfig(r=1, target_modules="all-linear")))
    rank = max(1, round(values / one))
    return get_peft_model(build(), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))


def shira(build: Callable, values: int) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    one = trainable(get_peft_model(build(), ShiraConfig(r=1, target_modules=targets)))
    return get_peft_model(build(), ShiraConfig(r=max(1, round(values / one)), target_modules=targets))


def full(build: Callable) -> nn.Module:
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("proj.weight"))
    return model


class Step:
    """Forward, backward and AdamW step of one model on one batch."""

    def __init__(self, model: nn.Module, batch: dict, density: float | None = None):
        self.model, self.batch = model.train(), batch
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
        if density is not None:  # the paper's own form: the full gradient, masked
            for parameter in parameters:
                mask = torch.rand(parameter.shape[0], 1) < density
                parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
        if self.optimizer is None:
            model.get_input_embeddings().register_forward_hook(lambda m, a, output: output.detach().requires_grad_())

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def measure(hidden: int, layers: int, length: int, size: int, dtype: torch.dtype, density: float, repeats: int):
    def build():
        return llama(hidden, layers, dtype).requires_grad_(False)

    batch = batches(1, size, length)[0]
    values = round(targeted_values(build()) * density)
    steps = {"frozen": Step(build(), batch)}
    steps |= {f"FGGM {g}s": Step(fggm(build, g, density), batch) for g in ("row", "column", "element")}
    steps["LoRA"] = Step(lora(build, values), batch)
    steps["SHiRA"] = Step(shira(build, values), batch)
    if density >= 0.3:
        steps["full, masked"] = Step(full(build), batch, density)
    results = ratios(interleaved(dict(steps), repeats), "frozen")
    for name, step in steps.items():
        results[name]["trainable"] = trainable(step.model)
        results[name]["peak_mib"] = peak_mib(step)
    for name in steps:
        for peer in ("LoRA", "SHiRA"):
            results[name][f"over_{peer}"] = results[name]["ratio_min"] / results[peer]["ratio_min"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case, few repeats")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    cases = [
        (512, 8, 128, 8, torch.float32, 0.3),
        (512, 8, 128, 8, torch.float32, 0.05),
        (512, 8, 128, 8, torch.float32, 0.01),
        (1024, 4, 128, 8, torch.bfloat16, 0.3),
        (1024, 4, 128, 8, torch.bfloat16, 0.05),
        (1024, 4, 128, 8, torch.bfloat16, 0.01),
    ]
    results = {}
    for hidden, layers, length, size, dtype, density in cases[:1] if arguments.quick else cases:
        name = f"{case_name(hidden, layers, length, size, dtype)}, density {density:.0%}"
        repeats = 3 if arguments.quick else arguments.repeats
        results[name] = measure(hidden, layers, length, size, dtype, density, repeats)
        show(name, results[name])
    if not arguments.quick:
        print("written to", write("training_step", results))


if __name__ == "__main__":
    main()
