"""``estimate``: what training an adapter will cost, before any data is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .core.criteria import CRITERIA
from .core.index_codec import entropy_bytes
from .core.threshold import Forecast
from .selection.likelihood import task_type_of
from .selection.measure import running_bytes
from .selection.select import active_adapter
from .step_memory import MakeBatch, copy_with_same_tensors, step_memory
from .tuner.config import FGGMConfig
from .tuner.layer import FGGMLayer
from .tuner.settings.fields import is_integer
from .tuner.settings.selection import score_bytes
from .tuner.support import forecast_supports, unwrapped
from .tuner.target import Target, Targets, find_targets

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What training an adapter will cost, in values and bytes. The text shows the meaning of each field.

    ``trainable_values`` includes modules that train whole. If it depends on scores, every figure is an upper bound, and
    ``least_values`` is the lower bound of the values. (A unit whose score is 0 is never chosen, which can lower the
    number further.) ``adapter_bytes`` is an upper bound for single elements, whose encoded indices differ in length.

    Not all gradients need to exist at the peak of a step, so ``peak_bytes`` may be less than the sum of its parts.
    ``selection_bytes`` uses the activations of a training step: within 10 % of what a CPU allocates, and an upper bound
    for rows, for which the pass stores less than the inputs. It and ``score_bytes`` are 0 if selection needs no data.
    """

    trainable_values: int
    least_values: int
    adapter_bytes: int = field(metadata={"label": "adapter file, without its header"})
    score_bytes: int = field(metadata={"label": "running scores of the selection pass"})
    base_bytes: int = field(metadata={"label": "base model, quantized weights as stored"})
    value_bytes: int = field(metadata={"label": "trainable values and indices"})
    gradient_bytes: int = field(metadata={"label": "gradients of the values"})
    optimizer_bytes: int = field(metadata={"label": "optimizer state"})
    activation_bytes: int = field(metadata={"label": "activations, logits and temporaries at the peak"})
    peak_bytes: int = field(metadata={"label": "peak of a training step"})
    selection_bytes: int = field(metadata={"label": "peak of the selection pass, in batches of that size"})

    @property
    def depends_on_scores(self) -> bool:
        """Whether scores decide the number of values."""
        return self.least_values < self.trainable_values

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return {**asdict(self), "depends_on_scores": self.depends_on_scores}

    def __str__(self) -> str:
        from rich.filesize import decimal

        lines = [f"{self.trainable_values:,} trainable values"]
        if self.depends_on_scores:
            lines = [f"at most {lines[0]} ({self.least_values:,} to {self.trainable_values:,}, depending on scores)"]
        sizes = [part for part in fields(self) if "label" in part.metadata]
        lines += [f"{decimal(getattr(self, part.name)):>10}  {part.metadata['label']}" for part in sizes]
        return "\n".join(lines)


def estimate(
    model: nn.Module,
    config: FGGMConfig | None = None,
    *,
    batch_size: int,
    sequence_length: int,
    optimizer: MakeOptimizer = torch.optim.AdamW,
    checkpointing: bool = False,
    make_batch: MakeBatch | None = None,
    adapter_name: str | None = None,
) -> CostEstimate:
    """Estimate what training will cost without any data. The model is left unchanged.

    One training step, forward and backward, runs on fake tensors at its real size, and every tensor that an operator
    creates is counted while it is alive. Batches contain one padded position, because a mask takes memory. Call
    ``estimate`` under the autocast of the training.

    Not counted are memory that kernels allocate internally, rounding and unused blocks of the allocator, the device's
    context, temporaries of the optimizer's step, and the batch. On a CPU the peak is exact or within 2 %
    (tests/test_cost.py); bfloat16 with checkpointing and few positions is up to 12 % too low. Nothing has been measured
    on a CUDA device.

    Args:
        model: a base model on any device, the meta device included, or a model with an FGGM adapter.
        config: config of the adapter to add; None for the adapter that the model has.
        batch_size: samples of a training step on one device.
        sequence_length: tokens of each sample; for a sequence-to-sequence model, of the input and of the answer.
        optimizer: a class of optimizers, or a function that makes an optimizer from parameters. Its state is counted
            after one step on the meta device.
        checkpointing: whether to use gradient checkpointing (not the reentrant kind).
        make_batch: ``(batch size, sequence length) -> a batch with labels``, for models whose input is not text.
        adapter_name: by default the active adapter.

    Raises:
        ValueError: neither an adapter nor a config, or both; a budget that cannot be spent; a bad argument; a model
            that returns no loss, or whose shapes depend on data (mixtures of experts that loop over their experts).
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not is_integer(value, least=1):
            raise ValueError(f"{name} must be an integer > 0, got {value!r}")
    adapted, config, adapter_name = _copy_with_adapter(model, config, adapter_name)
    targets = find_targets(adapted, adapter_name)
    forecast = _forecast(targets, config)
    if forecast is not None:
        for target, k in zip(targets.values(), forecast.units, strict=True):
            _set_planned_support_(target, k)
    sizes = _sizes(adapted, targets, forecast, optimizer)
    make_batch = make_batch or partial(_text_batch, adapted, config.task_type)
    step = step_memory(adapted, make_batch, batch_size, sequence_length, checkpointing)
    selecting = step.most_activations
    if forecast is not None and any(target.granularity.stores_partial_input for target in targets.values()):
        for target in targets.values():  # a step with all units keeps whole inputs, as the selection pass does
            _set_planned_support_(target, target.units)
        selecting = step_memory(adapted, make_batch, batch_size, sequence_length, checkpointing).most_activations
    scores = _score_bytes(targets, config)
    standing = sizes["base_bytes"] + sizes["value_bytes"] + sizes["optimizer_bytes"]
    return CostEstimate(
        **sizes,
        score_bytes=scores,
        activation_bytes=step.activations,
        peak_bytes=standing + step.activations + step.gradients,
        selection_bytes=sizes["base_bytes"] + selecting + scores if scores else 0,
    )


def _copy_with_adapter(
    model: nn.Module, config: FGGMConfig | None, adapter_name: str | None
) -> tuple[nn.Module, FGGMConfig, str]:
    """A copy of the model that has the adapter, the adapter's config, and its name."""
    if config is None:
        name, config = active_adapter(model, adapter_name)
        return copy_with_same_tensors(model), config, name
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has an adapter already; leave config out, or pass the base model")
    name = adapter_name or "default"
    # a criterion that needs data starts empty: nothing is chosen, and no weight is read
    own = copy.copy(config)
    own.criterion, own.reference, own.init_weights, own.selection = "fisher", None, True, None
    adapted = get_peft_model(copy_with_same_tensors(model), own, adapter_name=name)  # type: ignore[arg-type]
    actual: Any = adapted.peft_config[name]  # with the budget as a number
    actual.criterion, actual.reference = config.criterion, config.reference
    return adapted, actual, name


def _forecast(targets: Targets, config: FGGMConfig) -> Forecast | None:
    """Forecast of the selection; None if the adapter has its support already."""
    if all(target.is_selected for target in targets.values()):
        return None
    forecast = forecast_supports(targets, config)
    if not any(forecast.units):
        raise ValueError(f"the threshold {config.policy()} chooses nothing in any module, so nothing could train")
    return forecast


def _set_planned_support_(target: Target, k: int) -> None:
    """Give a target ``k`` units that lie evenly over the weight. Their values take no memory."""
    multiples = torch.arange(k, dtype=torch.int64, device=target.indices.device) * target.units
    indices = (multiples // max(1, k)).to(target.indices.dtype)
    target.layer.fggm_indices[target.adapter_name] = indices
    zero = torch.zeros((), dtype=target.values.dtype, device=target.values.device)
    target.values.data = zero.expand(target.granularity.values_shape(target.shape, k))
    target.layer.selected[target.adapter_name] = True


def _sizes(
    model: nn.Module, targets: Targets, forecast: Forecast | None, make_optimizer: MakeOptimizer
) -> dict[str, int]:
    """The figures that need no training step."""
    values = [target.values for target in targets.values()]
    own = {id(parameter) for parameter in values}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]  # modules that train whole
    planned = _count(values)
    most, least = (planned, planned) if forecast is None else (forecast.most, forecast.least)
    share = most / planned  # a budget may end within a unit
    indices = [target.indices for target in targets.values()]
    index_bytes, units = _bytes(indices), _count(indices)
    if least < most:  # the smallest units have the most indices
        most_units = most // min(target.unit_size for target in targets.values())
        units = max(units, most_units)
        index_bytes = max(index_bytes, most_units * max(tensor.element_size() for tensor in indices))
    encoded_bytes = index_bytes
    if next(iter(targets.values())).granularity.compresses_indices:
        total = sum(target.units for target in targets.values())
        entropy = entropy_bytes(min(units, total // 2), total)
        # a code takes at most 11 % more, and its last bytes may be nearly empty
        encoded_bytes = min(index_bytes, round(1.11 * entropy) + 8 * len(targets))
    gradients = round(_bytes(values) * share) + _bytes(others)
    return {
        "trainable_values": most + _count(others),
        "least_values": least + _count(others),
        "adapter_bytes": gradients + encoded_bytes,
        "base_bytes": _base_bytes(model, {*map(id, others), *_adapter_tensors(model)}),
        "value_bytes": gradients + index_bytes,
        "gradient_bytes": gradients,
        "optimizer_bytes": round(_state_bytes(values, make_optimizer) * share) + _state_bytes(others, make_optimizer),
    }


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _state_bytes(parameters: Iterable[Tensor], make_optimizer: MakeOptimizer) -> int:
    """Bytes of the optimizer's state after one step, which runs on the meta device."""
    twins = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in parameters if p.numel()]
    if not twins:
        return 0
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    optimizer = make_optimizer(twins)
    optimizer.step()
    return _bytes(leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor) and leaf.numel())


def _base_bytes(model: nn.Module, trained: set[int]) -> int:
    """Parameters and buffers that neither train nor belong to an adapter. Shared memory counts once."""
    tensors: list[Tensor] = []
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in trained:
            tensors += [tensor, *_quantization_state(tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _adapter_tensors(model: nn.Module) -> set[int]:
    """The ids of the tensors of all adapters."""
    layers = [module for module in model.modules() if isinstance(module, FGGMLayer)]
    parts = [part for layer in layers for part in (layer.fggm_values, layer.fggm_indices, layer.fggm_originals)]
    return {id(tensor) for part in parts for tensor in part.values()}


def _quantization_state(weight: Tensor) -> list[Tensor]:
    """The tensors that bitsandbytes stores with a quantized weight."""
    state = getattr(weight, "quant_state", None)
    tensors = [getattr(weight, name, None) for name in ("CB", "SCB")]
    for part in (state, getattr(state, "state2", None)):
        tensors += [] if part is None else list(vars(part).values())
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _score_bytes(targets: Targets, config: FGGMConfig) -> int:
    """Running sums of a pass, at most ``score_memory``. One dataloader is assumed if a reference is missing."""
    criterion = CRITERIA[config.criterion]
    if not criterion.needs_data:
        return 0
    names = [config.reference] if isinstance(config.reference, str) else config.reference
    sources = 1 if names is None else list(names).count("self")
    size = sum(running_bytes(target, criterion, sources) for target in targets.values())
    return size if config.score_memory is None else min(size, score_bytes(config.score_memory))


def _text_batch(model: nn.Module, task_type: str | None, batch_size: int, length: int) -> dict[str, Tensor]:
    """A batch of tokens, with one padded position, for a transformers model."""
    base: Any = unwrapped(model)
    if (name := getattr(base, "main_input_name", "input_ids")) != "input_ids":
        raise ValueError(f"the model takes {name!r}. Pass make_batch=: (batch size, sequence length) -> a batch")
    weight = next(base.parameters())
    tokens = torch.ones(batch_size, length, dtype=torch.int64, device="cpu" if weight.is_meta else weight.device)
    mask = tokens.clone()
    mask[-1, 1:][-1:] = 0
    task_type = task_type or task_type_of(base)
    has_span = task_type == TaskType.QUESTION_ANS
    labels = torch.zeros_like(tokens[:, 0] if has_span or task_type == TaskType.SEQ_CLS else tokens)
    names = ("start_positions", "end_positions") if has_span else ("labels",)
    return {"input_ids": tokens, "attention_mask": mask, **dict.fromkeys(names, labels)}
