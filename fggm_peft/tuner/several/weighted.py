"""Weighted sums of sparse deltas on the union of their supports, and PEFT's other ways to combine adapters.

The results equal those of PEFT's functions (``peft.utils.merge_utils``) for the dense deltas, which are zero outside
the union of the supports.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import merge_utils
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ...core.granularity import ELEMENTS, Granularity, Shape, UnitKind
from ...core.registry import require_one_of
from ...core.weight_delta import WeightDelta, spread, union
from ..config import FGGMConfig
from ..target import Target, Targets, find_targets

if TYPE_CHECKING:
    from ..model import FGGMModel

COMBINATIONS = {
    "linear": merge_utils.task_arithmetic,
    "magnitude_prune": merge_utils.magnitude_prune,
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
}


@dataclass(frozen=True)
class Combination:
    """How several tensors become one, see ``FGGMModel.add_weighted_adapter``; by default as a weighted sum."""

    kind: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        require_one_of("combination_type", self.kind, COMBINATIONS)
        require_one_of("majority_sign_method", self.majority_sign_method, ("total", "frequency"))
        if self.kind != "linear" and (self.density is None or not 0 < self.density <= 1):
            rule = "keeps the share `density` of each delta, in (0, 1]"
            raise ValueError(f"combination_type {self.kind!r} {rule}, got {self.density!r}")

    def of(self, tensors: Sequence[Tensor], weights: Sequence[float], entries: int) -> Tensor:
        """Combine tensors of one shape; ``density`` is a share of the ``entries`` of a dense delta."""
        options: dict[str, Any] = {}
        if self.kind != "linear":
            assert self.density is not None
            options["density"] = self.density
            if not self.kind.startswith("dare") and tensors[0].numel():
                # the same number of entries as in dense deltas; half an entry more, because PEFT rounds down
                options["density"] = min(1.0, (int(self.density * entries) + 0.5) / tensors[0].numel())
            if self.kind.endswith("ties"):
                options["majority_sign_method"] = self.majority_sign_method
        factors = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density .* no pruning")
            return COMBINATIONS[self.kind](list(tensors), factors, **options)


def common_granularity(granularities: Sequence[UnitKind]) -> UnitKind:
    """The granularity of all, or single elements if they differ."""
    return granularities[0] if len(set(granularities)) == 1 else ELEMENTS


def combine(
    deltas: Sequence[WeightDelta],
    weights: Sequence[float],
    granularity: Granularity,
    shape: Shape,
    how: Combination = Combination(),
) -> WeightDelta:
    """Combine deltas on the union of their supports, in float32 at least; see ``common_granularity``."""
    deltas = [delta if delta.granularity == granularity else delta.as_elements(shape) for delta in deltas]
    dtype = reduce(torch.promote_types, [delta.values.dtype for delta in deltas], torch.float32)
    indices, dim = union(deltas), granularity.unit_dim
    tensors = [spread(d.values.detach().to(dtype) * d.scale, d.indices, indices, dim) for d in deltas]
    return WeightDelta(granularity, indices, how.of(tensors, weights, shape[0] * shape[1]))


def add_weighted_adapter(
    model: FGGMModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: Combination
) -> None:
    """Add an adapter that combines others; ``ValueError`` if one is missing or they cannot be combined."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"give one weight for each adapter, got {len(weights)} for {list(adapters)}")
    if len(adapters) == 1:
        how = Combination()  # as PEFT does
    sources = _sources(model, adapters)
    wrappers = _modules_trained_whole(model, adapters)
    model.peft_config[adapter_name] = _config(model, adapters, sources, bool(wrappers))
    model.inject_adapter(model.model, adapter_name)
    model._cast_adapter_dtype(adapter_name)
    model.set_requires_grad(adapter_name, requires_grad=False)
    if not any(target.is_selected for targets in sources.values() for target in targets.values()):
        warnings.warn(f"none of {list(adapters)} has a support yet, so {adapter_name!r} has none", stacklevel=3)
        return
    for path, target in find_targets(model.model, adapter_name).items():
        terms = [(sources[name][path], w) for name, w in zip(adapters, weights, strict=True) if path in sources[name]]
        _fill(target, terms, how)
    for wrapper, name in wrappers.items():
        wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[name].state_dict())


def _sources(model: FGGMModel, adapters: Sequence[str]) -> dict[str, Targets]:
    """The targets of each adapter. Either all adapters have a support or none."""
    if missing := [name for name in adapters if name not in model.peft_config]:
        raise ValueError(f"Adapter {missing[0]} does not exist")
    sources = {name: find_targets(model.model, name) for name in adapters}
    empty = [name for name in adapters if not all(target.is_selected for target in sources[name].values())]
    if empty and len(empty) < len(adapters):
        raise ValueError(f"adapter {empty[0]!r} has no support yet: call fggm_peft.select_parameters, and train it")
    return sources


def _modules_trained_whole(model: nn.Module, adapters: Sequence[str]) -> dict[ModulesToSaveWrapper, str]:
    """The modules that one of the adapters trains as a whole, and the adapter's name."""
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    owners = {module: [name for name in adapters if name in module.modules_to_save] for module in wrappers}
    if conflicts := sum(len(names) > 1 for names in owners.values()):
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{conflicts} such instance(s)."
        )
    return {module: names[0] for module, names in owners.items() if names}


def _config(
    model: FGGMModel, adapters: Sequence[str], sources: dict[str, Targets], has_whole_modules: bool
) -> FGGMConfig:
    configs = [model.peft_config[name] for name in adapters]
    whole = {name for config in configs for name in config.modules_to_save or []} if has_whole_modules else None
    return FGGMConfig(
        granularity=common_granularity([config.granularity for config in configs]),
        target_modules=sorted({path for targets in sources.values() for path in targets}),
        modules_to_save=sorted(whole) if whole else None,
        quantized_merge=configs[0].quantized_merge,
        task_type=configs[0].task_type,
        base_model_name_or_path=configs[0].base_model_name_or_path,
        inference_mode=configs[0].inference_mode,
    )


def _fill(target: Target, terms: Sequence[tuple[Target, float]], how: Combination) -> None:
    """Give the new adapter its support and values. Units without a remaining value are left out."""
    if not terms:  # a path that only ends like one of another adapter's targets
        target.layer.set_support(target.adapter_name, target.indices)
        return
    deltas, weights = [source.delta() for source, _ in terms], [weight for _, weight in terms]
    total = combine(deltas, weights, target.granularity, target.shape, how)
    values = total.values.movedim(target.granularity.unit_dim, 0).unsqueeze(-1).flatten(1)
    total = total.restricted(values.any(1).nonzero()[:, 0])
    target.layer.set_support(target.adapter_name, total.indices)
    target.values.data.copy_(total.values)
