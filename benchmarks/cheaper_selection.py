"""The sketched selection against the exact pass: overlap of the selected units, and cost.

OMP_NUM_THREADS=1 python benchmarks/cheaper_selection.py MODEL DATA [--samples 64] [--rows 4]

MODEL is a folder of a causal language model, DATA a folder in TRACE's format. Each sample consists of several rows,
with the loss on all their answers, so that samples are longer than the number of projections.
"""

from __future__ import annotations

import argparse
import random
from contextlib import ExitStack

import torch
from common import batches as random_batches
from common import interleaved, ratios, show, write
from peft import get_peft_model
from selection import frozen_pass
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from fggm_peft import FGGMConfig
from fggm_peft.core.sketch import Sketch
from fggm_peft.core.statistics import Batch
from fggm_peft.selection import data_pass
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.selection.hooks import LayerHooks
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.selection.recorder import CallRecorder
from fggm_peft.selection.running_sums import RunningSums
from fggm_peft.training.base_model import BaseModel
from fggm_peft.training.data import DataSource, TokenizedExamples, load_examples
from fggm_peft.tuner.target import find_targets

SIZES = (4, 8, 16, 32)
DENSITIES = (0.05, 0.3)
ADAPTERS = {"default": "row", "column": "column"}
BATCH = 4

Scores = dict[str, Tensor]


def samples(tokenizer, data: str, count: int, rows: int) -> list[dict]:
    """Batches of ``count`` samples, each of several rows in a seeded random order."""
    examples = TokenizedExamples(load_examples(DataSource(data), tokenizer, None, 0), tokenizer, 1024)
    order = random.Random(0).sample(range(len(examples)), count * rows)
    together = [
        {
            name: [token for row in order[start : start + rows] for token in examples[row][name]]
            for name in ("input_ids", "attention_mask", "labels")
        }
        for start in range(0, count * rows, rows)
    ]
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [dict(collate(together[start : start + BATCH])) for start in range(0, count, BATCH)]


def both_granularities(base):
    """The model with an adapter for rows and one for columns, both without a support."""
    model = get_peft_model(base, FGGMConfig(granularity="row", target_modules="all-linear"))
    model.add_adapter("column", FGGMConfig(granularity="column", target_modules="all-linear"))
    return model


def run(fisher: DataPass, targets: dict, projections: int) -> None:
    data_pass.SKETCH_SIZE = projections
    fisher.run(targets)


def offline_scores(base, data: list[dict]) -> dict[str, dict[str, Tensor]]:
    """Variant -> module -> scores ``[2, units]``; the hooks of all variants share one pass."""
    model = both_granularities(base)
    likelihood = default_log_likelihood(base, None)
    recorders: dict[str, CallRecorder] = {}
    with ExitStack() as stack:
        for adapter, granularity in ADAPTERS.items():
            targets = find_targets(model, adapter)
            for size in (None, *SIZES):
                sketch = None if size is None else Sketch(size, seed=0)
                name = f"{granularity}s, " + ("exact" if size is None else f"sketch {size}")
                recorders[name] = CallRecorder(RunningSums(targets), sketch)
                stack.enter_context(LayerHooks(targets, recorders[name]))
        first = 0
        model.eval()
        for number, batch in enumerate(data):
            half = (torch.arange(len(batch["labels"])) + first) % 2
            for recorder in recorders.values():
                recorder.open(Batch(half, batch["attention_mask"] == 0, first))
            likelihood(base, batch).sum().backward()
            for recorder in recorders.values():
                recorder.finish(number)
            first += len(half)
    model.unload()
    return {
        name: {module: sums["fisher"] for module, sums in recorder.sums.tensors.items()}
        for name, recorder in recorders.items()
    }


def jaccard(a: Scores, b: Scores, density: float) -> float:
    """Jaccard index of the best units, over all modules."""
    both = either = 0
    for name, scores in a.items():
        k = round(density * len(scores))
        first, second = (set(values[name].topk(k).indices.tolist()) for values in (a, b))
        both, either = both + len(first & second), either + len(first | second)
    return both / either


def overlaps(base, data: list[dict]) -> dict[str, dict[str, float]]:
    scores = offline_scores(base, data)
    total = {name: {module: halves.sum(0) for module, halves in sums.items()} for name, sums in scores.items()}
    table: dict[str, dict[str, float]] = {"chance": {}}
    for granularity in ADAPTERS.values():
        exact = f"{granularity}s, exact"
        others = {name: sums for name, sums in total.items() if name.startswith(granularity) and name != exact}
        even, odd = ({module: halves[half] for module, halves in scores[exact].items()} for half in (0, 1))
        for density in DENSITIES:
            column = f"Jaccard at {density:.0%}"
            table["chance"][column] = density / (2 - density)
            table.setdefault(f"{exact}, one half of the samples against the other", {})[column] = jaccard(
                even, odd, density
            )
            for name, sums in others.items():
                table.setdefault(name, {})[column] = jaccard(total[exact], sums, density)
    return table


def costs(base, data: list[dict], repeats: int, sizes: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """CPU time of a pass over some batches, over that of a frozen forward and backward."""
    model = both_granularities(base)
    variants = {"frozen": lambda: frozen_pass(base, data)}
    for adapter, granularity in ADAPTERS.items():
        group = find_targets(model, adapter)
        for size in (0, *sizes):
            config = FGGMConfig(granularity=granularity, fisher_estimate="sketch" if size else "exact")
            fisher = DataPass(model, config, data)
            name = f"{granularity}s, " + (f"sketch {size}" if size else "exact")
            variants[name] = lambda f=fisher, g=group, size=size: run(f, g, size)

    result = ratios(interleaved(variants, repeats), "frozen")
    model.unload()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4, help="rows of the data in each sample")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    loader = BaseModel(arguments.model, dtype="float32")
    base = loader.load().requires_grad_(False)
    data = samples(loader.load_tokenizer(), arguments.data, arguments.samples, arguments.rows)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in data])
    setting = {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "samples": arguments.samples,
        "rows in a sample": arguments.rows,
        "tokens of a sample (mean)": float(lengths.float().mean()),
        "batch size": BATCH,
        "repeats": arguments.repeats,
    }
    long = random_batches(1, 1, 512, base.config.vocab_size)
    parts = {
        "overlap with the exact choice": lambda: overlaps(base, data),
        "CPU time, a batch of the data": lambda: costs(base, data[:1], arguments.repeats, SIZES),
        "CPU time, one sample of 512 tokens": lambda: costs(base, long, arguments.repeats, (16,)),
    }
    results: dict = {"setting": setting}
    for title, measure in parts.items():
        results[title] = measure()
        show(title, results[title])
    print("written to", write("cheaper_selection", results))


if __name__ == "__main__":
    main()
