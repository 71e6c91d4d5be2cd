"""Cost of the Fisher pass beside a frozen forward and backward of the same batch, and beside per-sample gradients.

All run in turns in one process. The time of a pass starts when it receives the batch and ends when it requests the
next one. Memory is the peak of what torch allocates on the CPU during the pass, including its results.

OMP_NUM_THREADS=1 python benchmarks/selection.py [--model FOLDER] [--quick] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator

import torch
from common import batches, clock, interleaved, llama, peak_mib, ratios, show, write
from peers import LOOP, Scores, peers
from peft import get_peft_model
from suite.bases import sharing_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fggm_peft import FGGMConfig, InputCovariance
from fggm_peft.selection.data_pass import DataPass, input_metrics
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.tuner.target import find_targets

CASES = ((32, 4), (128, 4), (512, 2))  # positions, samples
PEER_REPEATS = 2  # enough, because they take much longer than the noise


def frozen_pass(model, batch) -> None:
    """Forward, and backward to the output of the embeddings: what every method costs on a frozen base."""
    likelihood = default_log_likelihood(model, None)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        likelihood(model, batch).sum().backward()
    finally:
        handle.remove()


def pass_with_weight_gradients(model, batch) -> None:
    """Forward and backward with the gradients of all targeted weights, summed over samples."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()]
    weights = [layer.weight.requires_grad_() for layer in layers]
    try:
        torch.autograd.grad(default_log_likelihood(model, None)(model, batch).sum(), weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


class TimedBatch:
    """A dataloader that yields a batch twice, and times the second one until the next is requested.

    With the first one, the pass finds out which axis counts samples. This is not part of the time.
    """

    def __init__(self, batch: dict[str, torch.Tensor]):
        self.batch, self.seconds = batch, 0.0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield self.batch
        start = clock()
        yield self.batch
        self.seconds = clock() - start


class Selection:
    """Scores of one batch by this library: Fisher information, or gain under decay with a ``covariance``."""

    def __init__(self, model: PreTrainedModel, batch: dict, covariance: InputCovariance | None = None, **config):
        self.data, statistic = TimedBatch(batch), "fisher_under_decay" if covariance else "fisher"
        tuned = get_peft_model(sharing_weights(model), FGGMConfig(target_modules="all-linear", **config))
        self.targets = find_targets(tuned, "default")
        self.model = tuned.get_base_model()
        self.fisher = DataPass(tuned, tuned.peft_config["default"], self.data, statistics=(statistic,))
        self.fisher.metrics = input_metrics(self.targets, covariance) if covariance else {}

    def __call__(self) -> float:
        self.fisher.run(self.targets)
        return self.data.seconds

    def scores(self) -> Scores:
        totals = self.fisher.run(self.targets)
        count = totals.samples / 2  # each sample was read twice
        return {n.removeprefix("base_model.model."): count * totals.mean(n, "fisher") for n in self.targets}

    def sums_mib(self) -> float:
        """Size of the result for elements: running sums of both halves of the samples."""
        return sum(2 * 4 * math.prod(target.shape) for target in self.targets.values()) / 2**20


def selections(model: PreTrainedModel, batch: dict) -> dict[str, Selection]:
    return {
        "rows, exact": Selection(model, batch, granularity="row"),
        "columns, exact": Selection(model, batch, granularity="column"),
        "elements, exact": Selection(model, batch, granularity="element"),
    }


def error(scores: Scores, expected: Scores) -> float:
    """The largest relative error of a layer's scores."""
    return max(float((scores[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def layer_mib(model: PreTrainedModel, batch: dict) -> float:
    """Memory that one block keeps from forward to backward in the frozen pass."""
    layers = model.model.layers
    with_all = peak_mib(lambda: frozen_pass(model, batch))
    model.model.layers = layers[:-2]
    try:
        return (with_all - peak_mib(lambda: frozen_pass(model, batch))) / 2
    finally:
        model.model.layers = layers


def checkpointed_mib(model: PreTrainedModel, batch: dict) -> dict[str, float]:
    """Peaks with gradient checkpointing."""
    ours = Selection(model, batch, granularity="row")
    passes = {"frozen, checkpointed": (sharing_weights(model), None), "rows, exact, checkpointed": (ours.model, ours)}
    result = {}
    for name, (of_pass, run) in passes.items():
        of_pass.gradient_checkpointing_enable()
        of_pass.train()
        result[name] = peak_mib(run or functools.partial(frozen_pass, of_pass, batch))
    return result


def measure(model: PreTrainedModel, length: int, size: int, repeats: int) -> dict[str, dict[str, float]]:
    batch = batches(1, size, length, model.config.vocab_size)[0]
    ours, others = selections(model, batch), peers(model)
    frozen = sharing_weights(model)
    calls = {"frozen": functools.partial(frozen_pass, frozen, batch), **ours}
    scores_of: dict[str, Scores] = {}

    def keep(name: str) -> None:
        scores_of[name] = others[name](batch)

    slow = {name: functools.partial(keep, name) for name in others}
    peaks = {name: peak_mib(call) for name, call in (calls | slow).items()}  # warms up, too
    results = ratios(interleaved(calls, repeats, warm_up=0), "frozen")
    floor_and_slow = {"frozen": calls["frozen"], **slow}
    together = ratios(interleaved(floor_and_slow, min(repeats, PEER_REPEATS), warm_up=0), "frozen")
    results |= {name: row for name, row in together.items() if name in slow}
    exact = scores_of[LOOP]
    scores_of["rows, exact"] = ours["rows, exact"].scores()
    for name, scores in scores_of.items():
        results[name]["error"] = error(scores, exact)
    for name, peak in peaks.items():
        results[name]["peak_mib"] = peak
    results["elements, exact"]["of_it_sums_mib"] = ours["elements, exact"].sums_mib()
    first = {key: value[:1] for key, value in batch.items()}
    extra = {"rows, exact, one sample": peak_mib(Selection(model, first, granularity="row"))}
    extra |= {"one layer's activations": layer_mib(frozen, batch)} | checkpointed_mib(model, batch)
    return results | {name: {"peak_mib": peak} for name, peak in extra.items()}


def verdicts(results: dict[str, dict[str, float]], length: int, hidden: int) -> dict[str, dict[str, float | bool]]:
    """Each goal of one case, its result, and whether it is met."""

    def verdict(reached: float, goal: float) -> dict[str, float | bool]:
        return {"reached": reached, "goal": goal, "met": reached <= goal}

    goals = {}
    for name, goal in (("rows", 1.15), ("columns", 1.15), ("elements", 1.5)):
        if length <= 0.3 * hidden or name == "elements":
            goals[f"{name}: time over the frozen pass"] = verdict(results[f"{name}, exact"]["ratio_min"], goal)
    layer = results["one layer's activations"]["peak_mib"]
    extra = results["rows, exact, checkpointed"]["peak_mib"] - results["frozen, checkpointed"]["peak_mib"]
    goals["rows, checkpointed: layers' activations over the frozen pass"] = verdict(extra / layer, 1.0)
    rows = results["rows, exact"]
    one = results["rows, exact, one sample"]
    for peer in (name for name, row in results.items() if "error" in row and name != "rows, exact"):
        same_size = one if peer == LOOP else rows  # the loop has one sample at a time in memory
        goals[f"rows: time over {peer}"] = verdict(rows["ratio_min"] / results[peer]["ratio_min"], 1.0)
        goals[f"rows: peak memory over {peer}"] = verdict(same_size["peak_mib"] / results[peer]["peak_mib"], 1.0)
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, e.g. of SmolLM2-135M, to measure beside the random Llama")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="a small random model at one length; nothing is written")
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    dtype, cases, repeats = getattr(torch, arguments.dtype), CASES, arguments.repeats
    models = {"Llama, random weights": functools.partial(llama, 768, 8, dtype)}
    if arguments.model:
        load = AutoModelForCausalLM.from_pretrained
        models[arguments.model.rstrip("/").rpartition("/")[2]] = lambda: load(arguments.model, dtype=dtype).eval()
    if arguments.quick:
        models, cases, repeats = {"Llama, random weights": functools.partial(llama, 256, 4, dtype)}, CASES[1:2], 2
    figures, goals = {}, {}
    for model_name, build in models.items():
        model = build().requires_grad_(False)
        hidden = model.config.hidden_size
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        for length, size in cases:
            name = f"{model_name}, {millions:.0f} M, hidden {hidden}, T {length}, batch {size}, {arguments.dtype}"
            figures[name] = measure(model, length, size, repeats)
            goals[name] = verdicts(figures[name], length, hidden)
            show(name, figures[name])
            show("goals", goals[name])
            if not arguments.quick:  # after each case, so that what is done stays when the rest is given up
                print("written to", write("selection", {"figures": figures, "goals": goals}))


if __name__ == "__main__":
    main()
