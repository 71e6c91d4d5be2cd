"""Other ways to compute row scores from per-sample gradients: a loop, torch.func, Opacus and BackPACK.

Each computes the per-sample gradients of every targeted weight, and sums their squares over samples and input features,
like the Fisher pass. ``peers(model)`` lists those that are installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fggm_peft.selection.likelihood import default_log_likelihood

Scores = dict[str, Tensor]
LOOP = "naive one-sample loop"
Peer = Callable[[dict[str, Tensor]], Scores]


def twin(model: nn.Module) -> nn.Module:
    """A frozen copy that shares the memory of the parameters."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that ``target_modules="all-linear"`` matches: all except the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _trainable(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Linear]]:
    model = twin(model)
    layers = targets(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return model, layers


def naive_loop(model: nn.Module) -> Peer:
    """One sample at a time, with the full weight gradient of every layer."""
    model, layers = _trainable(model)
    likelihood = default_log_likelihood(model, None)

    def run(batch: dict[str, Tensor]) -> Scores:
        scores = {
            name: torch.zeros(layer.weight.shape[0], device=layer.weight.device) for name, layer in layers.items()
        }
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            gradients = torch.autograd.grad(likelihood(model, one).sum(), [m.weight for m in layers.values()])
            for score, gradient in zip(scores.values(), gradients, strict=True):
                score += gradient.float().square().sum(1)
        return scores

    return run


def torch_func(model: nn.Module) -> Peer:
    """``vmap`` of ``grad`` over the samples, without an attention mask, whose values vmap cannot inspect."""
    model = twin(model)
    weights = {f"{name}.weight": layer.weight.detach() for name, layer in targets(model).items()}

    def log_likelihood(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = functional_call(model, weights, (), {"input_ids": ids[None]}).logits[0, :-1]
        return -nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum")

    def run(batch: dict[str, Tensor]) -> Scores:
        gradients = vmap(grad(log_likelihood), in_dims=(None, 0))(weights, batch["input_ids"])
        scores = {}
        for name in list(gradients):
            scores[name.removesuffix(".weight")] = gradients.pop(name).square().sum((0, 2))
        return scores

    return run


def opacus(model: nn.Module) -> Peer:
    """Opacus' ``GradSampleModule``, which sets ``grad_sample`` on each weight."""
    from opacus import GradSampleModule

    model, layers = _trainable(model)
    likelihood = default_log_likelihood(model, None)
    wrapped = GradSampleModule(
        model.train(), loss_reduction="sum"
    )  # hooks run in training mode only; the model has no dropout

    def run(batch: dict[str, Tensor]) -> Scores:
        likelihood(wrapped, batch).sum().backward()
        scores = {}
        for name, layer in layers.items():
            scores[name] = layer.weight.grad_sample.square().sum((0, 2))
            layer.weight.grad_sample = layer.weight.grad = None
        return scores

    return run


def backpack(model: nn.Module) -> Peer:
    """BackPACK's ``SumGradSquared`` on the linear layers."""
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    model, layers = _trainable(model)
    likelihood = default_log_likelihood(model, None)
    for layer in layers.values():
        extend(layer)

    def run(batch: dict[str, Tensor]) -> Scores:
        with backpack(SumGradSquared()):
            likelihood(model, batch).sum().backward()
        scores = {}
        for name, layer in layers.items():
            scores[name] = layer.weight.sum_grad_squared.sum(1)
            layer.weight.sum_grad_squared = layer.weight.grad = None
        return scores

    return run


def peers(model: nn.Module) -> dict[str, Peer]:
    """Name -> function from a batch to scores, without packages that are not installed."""
    result = {LOOP: naive_loop(model), "torch.func, vmap of grad": torch_func(model)}
    for package, name, make in (
        ("opacus", "Opacus, grad_sample", opacus),
        ("backpack", "BackPACK, SumGradSquared", backpack),
    ):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: pip install -c constraints.txt .[benchmarks]")
        else:
            result[name] = make(model)
    return result
