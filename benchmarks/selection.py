"""The Fisher pass against a frozen forward and backward of the same batches, and against a naive loop.

python benchmarks/selection.py [--quick] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse

import torch
from common import batches, case_name, interleaved, llama, ratios, show, write
from peft import get_peft_model

from fggm_peft import FGGMConfig
from fggm_peft.selection.fisher_pass import FisherPass
from fggm_peft.selection.log_likelihood import default_log_likelihood
from fggm_peft.tuner.support import fggm_layers


def frozen_pass(model, data) -> None:
    """Forward and backward down to the embeddings' output, as any frozen base costs."""
    likelihood = default_log_likelihood(model, None)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        for batch in data:
            likelihood(model, batch).sum().backward()
    finally:
        handle.remove()


def naive_pass(model, data) -> None:
    """One sample at a time, with the full weight gradient of every linear layer: what the Gram form replaces."""
    likelihood = default_log_likelihood(model, None)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    scores = [torch.zeros(len(weight)) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    for batch in data:
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            gradients = torch.autograd.grad(likelihood(model, one).sum(), weights)
            for score, gradient in zip(scores, gradients, strict=True):
                score += gradient.float().square().sum(1)
    for weight in weights:
        weight.requires_grad_(False)


def measure(hidden: int, layers: int, length: int, size: int, dtype: torch.dtype, repeats: int):
    data = batches(1, size, length)
    base = llama(hidden, layers, dtype).requires_grad_(False)
    variants = {"frozen": lambda: frozen_pass(base, data), "naive one-sample loop": lambda: naive_pass(base, data)}
    for granularity in ("row", "column", "element"):
        model = get_peft_model(llama(hidden, layers, dtype), FGGMConfig(granularity=granularity))
        fisher = FisherPass(model, model.peft_config["default"], "default", data, None, progress=False)
        group = fggm_layers(model, "default")
        variants[f"{granularity}s, exact"] = lambda f=fisher, g=group: f.run(g, None, None, 1, "")
    return ratios(interleaved(variants, repeats), "frozen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small model, few repeats")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    cases = [(512, 8, 128, 8, torch.float32), (1024, 4, 128, 8, torch.float32), (1024, 4, 128, 8, torch.bfloat16)]
    results = {}
    for hidden, layers, length, size, dtype in cases[:1] if arguments.quick else cases:
        name = case_name(hidden, layers, length, size, dtype)
        repeats = 3 if arguments.quick else arguments.repeats
        results[name] = measure(hidden, layers, length, size, dtype, repeats)
        show(name, results[name])
    if not arguments.quick:
        print("written to", write("selection", results))


if __name__ == "__main__":
    main()
