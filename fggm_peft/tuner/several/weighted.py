"""Several adapters combined into a new one: PEFT's weighted combinations, on the union of the supports.

A combination is what PEFT's functions (``peft.utils.merge_utils``) make of the dense deltas. Outside the union of
the supports every delta is zero, and so is what they make of it, so no dense delta is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from peft.utils.merge_utils import (
    calculate_majority_sign_mask,
    disjoint_merge,
    random_pruning,
    reshape_weight_task_tensors,
)
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...core.granularity import Granularity
from ...core.weight_delta import WeightDelta, as_elements, spread, union
from ..config import FGGMConfig
from ..support import fggm_layers

if TYPE_CHECKING:
    from ..layer import FGGMLayer
    from ..model import FGGMModel

SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class Combination:
    """How deltas become one.

    Args:
        pruning: which part of each delta is kept first: the largest entries, random ones (the rest scaled up), or all.
        elects_sign: of each entry only the deltas that agree with the majority's sign count, and their mean is taken.
    """

    pruning: Literal["none", "magnitude", "random"]
    elects_sign: bool


COMBINATIONS = {
    "linear": Combination("none", False),
    "magnitude_prune": Combination("magnitude", False),
    "ties": Combination("magnitude", True),
    "dare_linear": Combination("random", False),
    "dare_ties": Combination("random", True),
}


@dataclass(frozen=True)
class WeightedSum:
    """What to combine, and how.

    Raises:
        ValueError: a value is out of its range; says which.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination_type: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if not self.adapters or len(self.adapters) != len(self.weights):
            raise ValueError(f"give one weight for each adapter, got {len(self.weights)} for {list(self.adapters)}")
        if self.combination_type not in COMBINATIONS:
            raise ValueError(
                f"Invalid combination_type: {self.combination_type!r}; it must be one of {', '.join(COMBINATIONS)}"
            )
        if self.majority_sign_method not in SIGN_METHODS:
            raise ValueError(f"majority_sign_method must be one of {SIGN_METHODS}, got {self.majority_sign_method!r}")
        prunes = COMBINATIONS[self.combination_type].pruning != "none"
        if prunes and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(
                f"combination_type {self.combination_type!r} keeps the share `density` of each delta, in (0, 1], "
                f"got {self.density!r}"
            )

    @property
    def combination(self) -> Combination:
        """How; of a single adapter there is nothing but its weighted self, as in PEFT."""
        return COMBINATIONS["linear" if len(self.adapters) == 1 else self.combination_type]

    def of(self, tensors: Sequence[Tensor], weights: Sequence[float], entries: int) -> Tensor:
        """The combination of deltas that are given where one of them may differ from zero.

        Args:
            tensors: all of one shape.
            weights: one for each.
            entries: how many entries a dense delta has; ``density`` is a share of these.
        """
        pruned = torch.stack([self._pruned(tensor, entries) for tensor in tensors])
        factors = reshape_weight_task_tensors(pruned, torch.tensor(weights, dtype=pruned.dtype, device=pruned.device))
        if not self.combination.elects_sign:
            return (pruned * factors).sum(0)
        majority = calculate_majority_sign_mask(pruned, method=self.majority_sign_method)  # type: ignore[arg-type]
        return disjoint_merge(pruned * factors, majority)

    def _pruned(self, tensor: Tensor, entries: int) -> Tensor:
        if self.combination.pruning == "none" or self.density == 1:
            return tensor
        assert self.density is not None
        if self.combination.pruning == "random":
            return random_pruning(tensor, self.density, rescale=True)
        kept = min(int(self.density * entries), tensor.numel())
        largest = tensor.abs().flatten().topk(kept).indices
        result = torch.zeros_like(tensor)
        result.view(-1)[largest] = tensor.flatten()[largest]
        return result


def add_weighted_adapter(model: FGGMModel, wanted: WeightedSum, adapter_name: str) -> None:
    """Add an adapter that is the combination of others; they stay as they are.

    Raises:
        ValueError: one of the adapters does not exist or has no support yet, or they cannot be combined.
    """
    layers = _layers_of_each(model, wanted.adapters)
    sources = _modules_trained_whole(model, wanted.adapters)
    config = _config(model, wanted, layers, sources)
    model.peft_config[adapter_name] = config
    model.inject_adapter(model.model, adapter_name)
    model._cast_adapter_dtype(adapter_name)
    model.set_requires_grad(adapter_name, requires_grad=False)
    for layer in fggm_layers(model.model, adapter_name).values():
        _fill(layer, wanted, adapter_name)
    with torch.no_grad():
        for wrapper, name in sources.items():
            wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[name].state_dict())


def _layers_of_each(model: FGGMModel, adapters: Sequence[str]) -> dict[str, dict[str, FGGMLayer]]:
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    layers = {name: fggm_layers(model.model, name) for name in adapters}
    for name, of_adapter in layers.items():
        if not all(layer.selected[name] for layer in of_adapter.values()):
            raise ValueError(f"adapter {name!r} has no support yet: call fggm_peft.select_parameters, and train it")
    return layers


def _modules_trained_whole(model: nn.Module, adapters: Sequence[str]) -> dict[ModulesToSaveWrapper, str]:
    """The modules that exactly one of the adapters trains whole, and which does."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    owners = {module: [name for name in adapters if name in module.modules_to_save] for module in wrappers}
    if several := sum(len(names) > 1 for names in owners.values()):
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{several} such instance(s)."
        )
    return {module: names[0] for module, names in owners.items() if names}


def _config(model: FGGMModel, wanted: WeightedSum, layers, sources) -> FGGMConfig:
    configs = [model.peft_config[name] for name in wanted.adapters]
    kinds = {config.granularity for config in configs}
    bias = {config.bias for config in configs if config.bias != "none"}
    if len(kinds) > 1 and bias:
        names = ", ".join(sorted(map(str, kinds)))
        raise ValueError(
            f"adapters of different granularities ({names}) combine into single elements, which "
            f"cannot hold the bias entries of rows; one of {list(wanted.adapters)} has bias={bias.pop()!r}"
        )
    first = configs[0]
    names = {name for of_adapter in layers.values() for name in of_adapter}
    whole = {name for config in configs for name in config.modules_to_save or []} if sources else None
    return FGGMConfig(
        granularity=kinds.pop() if len(kinds) == 1 else "element",
        target_modules=sorted(names),
        modules_to_save=sorted(whole) if whole else None,
        bias=bias.pop() if bias else "none",
        quantized_merge=first.quantized_merge,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=first.inference_mode,
    )


def _fill(layer: FGGMLayer, wanted: WeightedSum, adapter_name: str) -> None:
    """Give the new adapter of one layer its support and values."""
    granularity = layer.granularity[adapter_name]
    here = [(n, w) for n, w in zip(wanted.adapters, wanted.weights, strict=True) if n in layer.fggm_values]
    deltas = [_as_granularity(layer, name, granularity) for name, _ in here]
    weights = [weight for _, weight in here]
    if not deltas:  # a name of another adapter's target that ends like this one's
        layer.set_support(adapter_name, layer.fggm_indices[adapter_name])
        return
    indices = union(deltas)
    o, i = layer.weight_shape
    dim = granularity.unit_dim
    values = wanted.of([spread(d.values, d.indices, indices, dim) for d in deltas], weights, o * i)
    kept = values.movedim(dim, 0).reshape(len(indices), -1).any(1)
    bias = None
    if adapter_name in layer.fggm_bias:
        entries = [layer.fggm_bias[n].detach().float() * layer.scaling[n] for n, _ in here if n in layer.fggm_bias]
        at = [layer.fggm_indices[n] for n, _ in here if n in layer.fggm_bias]
        own = [weight for name, weight in here if name in layer.fggm_bias]
        bias = wanted.of([spread(e, a, indices, 0) for e, a in zip(entries, at, strict=True)], own, o)
        kept |= bias != 0
    layer.set_support(adapter_name, indices[kept])
    with torch.no_grad():
        layer.fggm_values[adapter_name].copy_(values.index_select(dim, kept.nonzero()[:, 0]))
        if bias is not None:
            layer.fggm_bias[adapter_name].copy_(bias[kept])


def _as_granularity(layer: FGGMLayer, adapter_name: str, granularity: Granularity) -> WeightDelta:
    """An adapter's delta in units of one kind, its scale in its values, float32 at least."""
    delta = layer.delta(adapter_name)
    values = delta.values.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32)) * delta.scale
    scaled = WeightDelta(delta.granularity, delta.indices, values)
    return scaled if delta.granularity == granularity else as_elements(scaled, layer.weight_shape)
