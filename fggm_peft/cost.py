"""``estimate``: what an adapter will cost, before any data is read."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .core.criteria import CRITERIA
from .core.index_codec import most_index_bytes
from .core.registry import Registry
from .core.threshold import Forecast
from .memory_probe import MakeBatch, as_it_was, probed_supports, step_memory
from .selection.likelihood import task_type_of
from .selection.scoring import running_bytes
from .selection.select import active_adapter
from .tuner.config import FGGMConfig
from .tuner.layer import FGGMLayer
from .tuner.settings.selection import score_bytes
from .tuner.support import fggm_layers, forecast_supports, unwrapped
from .tuner.target import Target

if TYPE_CHECKING:
    from rich.table import Table

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: Registry[MakeOptimizer] = Registry("optimizer")
for _class in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad"):
    OPTIMIZERS.register(_class.lower())(getattr(torch.optim, _class))


@dataclass(frozen=True)
class CostEstimate:
    """What training an adapter will cost, in values and bytes.

    Where the number of values depends on scores, every figure is for the most it can be, and ``least_values`` says
    how few it may be. (A unit whose score is 0 is never chosen; that can make it fewer in every case.)

    Args:
        trainable_values: of the adapter, and of modules that train whole.
        least_values: equal to it where the number does not depend on scores.
        adapter_bytes: the tensors of the saved file, those of single elements at most: how far their indices can be
            encoded depends a little on which they are. Its header adds some 100 bytes for each tensor.
        base_bytes: the base's weights, quantized ones as they are stored, with buffers.
        value_bytes: the trainable values and their indices.
        gradient_bytes: their gradients.
        optimizer_bytes: what the optimizer keeps for them.
        score_bytes: running scores of the selection pass; 0 if it needs no data.
        activation_bytes: whatever else a training step allocates at its peak: saved activations, logits and
            their gradients, temporary copies of weights.
        peak_bytes: all that is there at the peak of a training step. By then not all gradients need be there, so
            that it may be less than the sum of its parts.
        selection_bytes: all that is there at the peak of a selection pass over batches of the same size, 0 if selection
            needs no data. Taken as what a training step has of activations: within 10 % of what a CPU allocates, and
            an upper bound for rows, of which less than the inputs is kept.
        batch_size: samples of a step.
        sequence_length: tokens of each.
        optimizer: its name.
        checkpointing: whether activations are computed again in backward.
    """

    trainable_values: int
    least_values: int
    adapter_bytes: int
    base_bytes: int
    value_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    score_bytes: int
    activation_bytes: int
    peak_bytes: int
    selection_bytes: int
    batch_size: int
    sequence_length: int
    optimizer: str
    checkpointing: bool

    @property
    def depends_on_scores(self) -> bool:
        """Whether the number of values is known only once there are scores."""
        return self.least_values < self.trainable_values

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return {**asdict(self), "depends_on_scores": self.depends_on_scores}

    def to_table(self) -> Table:
        """For rich to print."""
        from rich.filesize import decimal
        from rich.table import Table

        at_most = "at most " if self.depends_on_scores else ""
        checkpointed = ", with gradient checkpointing" if self.checkpointing else ""
        table = Table(
            title=f"{at_most}{self.trainable_values:,} trainable values",
            caption=f"a step of {self.batch_size} x {self.sequence_length} tokens{checkpointed}, {self.optimizer}",
        )
        table.add_column("what")
        table.add_column("size", justify="right")
        if self.depends_on_scores:
            table.add_row("values, depending on scores", f"{self.least_values:,} to {self.trainable_values:,}")
        for name, size in (
            ("adapter file, without its header", self.adapter_bytes),
            ("running scores of the selection pass", self.score_bytes),
            ("base model", self.base_bytes),
            ("trainable values and indices", self.value_bytes),
            ("gradients of the values", self.gradient_bytes),
            ("optimizer state", self.optimizer_bytes),
            ("activations, logits and temporaries at the peak", self.activation_bytes),
            ("peak of a training step", self.peak_bytes),
            ("peak of the selection pass, in batches of that size", self.selection_bytes),
        ):
            table.add_row(name, decimal(size))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self.to_table())
        return text.getvalue()


def estimate(
    model: nn.Module,
    config: FGGMConfig | None = None,
    *,
    batch_size: int,
    sequence_length: int,
    optimizer: str | MakeOptimizer = "adamw",
    checkpointing: bool = False,
    make_batch: MakeBatch | None = None,
    adapter_name: str | None = None,
) -> CostEstimate:
    """What training would cost, without any data: a dry run. The model is left as it was.

    The peak comes from counting every tensor of a training step, forward and backward: at its own size if that is
    small (512 tokens) or the model is on the meta device, else in up to six small steps whose counts are extended
    operator by operator. Batches have a position of padding, as most do, since a mask takes memory; on the meta device,
    where a model cannot look at it, there is none without checkpointing. Call it under the autocast of the training.

    Covered are the weights, values, gradients, optimizer state, and every tensor that an operator of torch makes.
    Not covered are what kernels allocate inside, what the allocator rounds up or leaves unused, the device's
    context, temporaries of the optimizer's step, and the batch itself. Measured on a CPU against torch's profiler
    (tests/test_cost.py) the peak of a small Llama was exact to the byte, dense and 4-bit; with checkpointing up
    to 5056 bytes a layer too low, the random states that it keeps. GPT-2, T5, BERT and bfloat16 were within 2 %,
    bfloat16 with checkpointing and few positions up to 12 % too low, by the buffers of the kernels there.
    Nothing has been measured on a CUDA device. Attention over a sliding window, and whatever else changes its
    operators with the length, is not extended exactly; rows and columns that leave weights uncopied, with few
    positions, are then counted with the copy of one too much.

    Args:
        model: a base model, on any device, or one that has an FGGM adapter.
        config: what the adapter would be; None for the adapter that the model has.
        batch_size: samples of a training step, on one device.
        sequence_length: tokens of each sample; for a sequence-to-sequence model of the input and of the answer.
        optimizer: "adamw", "adam", "sgd", "rmsprop", "adagrad", or a function that makes one of
            parameters; its state is counted by a step of it on the meta device.
        checkpointing: count with gradient checkpointing (not the reentrant kind), or without it.
        make_batch: for models that do not take ``input_ids``, ``attention_mask`` and ``labels``.
        adapter_name: by default the active adapter.

    Raises:
        ValueError: no adapter and no config, or both; a budget that cannot be spent; a bad argument.
    """
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer > 0, got {value!r}")
    make_optimizer = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    with _with_adapter(model, config, adapter_name) as (adapted, config, adapter_name):
        layers = fggm_layers(adapted, adapter_name)
        plan = _plan(layers, config, adapter_name)
        with nullcontext() if plan is None else probed_supports(layers, adapter_name, plan.units):
            sizes = _sizes(adapted, layers, adapter_name, plan, make_optimizer)
            make_batch = make_batch or _token_batches(adapted, config)
            size = batch_size, sequence_length, checkpointing
            step = step_memory(adapted, make_batch, *size)
        selecting = step.most_activations
        if plan is not None and any(layer.granularity[adapter_name].stores_partial_input for layer in layers.values()):
            with probed_supports(layers, adapter_name, _whole(layers, adapter_name)):
                selecting = step_memory(adapted, make_batch, *size).most_activations
        scores = _score_bytes(layers, config, adapter_name)
    standing = sizes["base_bytes"] + sizes["value_bytes"] + sizes["optimizer_bytes"]
    return CostEstimate(
        **sizes,
        score_bytes=scores,
        activation_bytes=step.activations,
        peak_bytes=standing + step.activations + step.gradients,
        selection_bytes=sizes["base_bytes"] + selecting + scores if scores else 0,
        batch_size=batch_size,
        sequence_length=sequence_length,
        optimizer=optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", "optimizer"),
        checkpointing=checkpointing,
    )


@contextmanager
def _with_adapter(
    model: nn.Module, config: FGGMConfig | None, adapter_name: str | None
) -> Iterator[tuple[nn.Module, FGGMConfig, str]]:
    """The model with the adapter that is meant, for a while if it has none yet; its config as it was given."""
    if config is None:
        name, config = active_adapter(model, adapter_name)
        yield model, config, name
        return
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has an adapter already; leave config out, or pass the base model")
    name = adapter_name or "default"
    # born empty, whatever the criterion: nothing is chosen, and no weight is read
    twin = copy.copy(config)
    twin.criterion, twin.reference, twin.init_weights, twin.selection = "fisher", None, True, None
    with as_it_was(model):
        adapted = get_peft_model(model, twin, adapter_name=name)  # type: ignore[arg-type]
        original = copy.copy(twin)
        original.criterion, original.reference = config.criterion, config.reference
        yield adapted, original, name


def _plan(layers: Mapping[str, FGGMLayer], config: FGGMConfig, adapter_name: str) -> Forecast | None:
    """What will be chosen; None if it has been."""
    if all(layer.selected[adapter_name] for layer in layers.values()):
        return None
    plan = forecast_supports(layers, config, adapter_name)
    if not any(plan.units):
        raise ValueError(f"the threshold {config.policy()} chooses nothing in any module, so nothing could train")
    return plan


def _whole(layers: Mapping[str, FGGMLayer], adapter_name: str) -> list[int]:
    """All units of every layer: a step then keeps whole inputs, as the selection pass does."""
    return [layer.granularity[adapter_name].units(layer.weight_shape) for layer in layers.values()]


def _sizes(
    model: nn.Module,
    layers: Mapping[str, FGGMLayer],
    adapter_name: str,
    plan: Forecast | None,
    make_optimizer: MakeOptimizer,
) -> dict[str, int]:
    """The figures that are known without a step."""
    values = [parameter for layer in layers.values() for parameter in layer.trained(adapter_name)]
    own = {id(parameter) for parameter in values}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]  # modules that train whole
    indices = [layer.fggm_indices[adapter_name] for layer in layers.values()]
    laid_out = _count(values)
    most, least = (laid_out, laid_out) if plan is None else (plan.most, plan.least)
    share = most / laid_out  # a plan may leave a part of a unit
    index_bytes, units = _bytes(indices), _count(indices)
    if least < most:  # the cheapest units have the most indices
        costs = [Target(name, layer, adapter_name).unit_size for name, layer in layers.items()]
        units = max(units, most // min(costs))
        index_bytes = max(index_bytes, most // min(costs) * max(tensor.element_size() for tensor in indices))
    kinds = [layer.granularity[adapter_name] for layer in layers.values()]
    sizes = [kind.units(layer.weight_shape) for kind, layer in zip(kinds, layers.values(), strict=True)]
    encoded = min(index_bytes, most_index_bytes(kinds[0].index_codecs, min(units, sum(sizes)), sizes))
    gradients = round(_bytes(values) * share) + _bytes(others)
    return {
        "trainable_values": most + _count(others),
        "least_values": least + _count(others),
        "adapter_bytes": gradients + encoded,
        "base_bytes": _base_bytes(model, {*own, *map(id, others)}),
        "value_bytes": gradients + index_bytes,
        "gradient_bytes": gradients,
        "optimizer_bytes": round(_state_bytes(values, make_optimizer) * share) + _state_bytes(others, make_optimizer),
    }


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _state_bytes(parameters: Iterable[Tensor], make_optimizer: MakeOptimizer) -> int:
    """What the optimizer keeps after a step, taken on the meta device."""
    twins = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in parameters if p.numel()]
    if not twins:
        return 0
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    optimizer = make_optimizer(twins)
    optimizer.step()
    return _bytes(leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor) and leaf.numel())


def _base_bytes(model: nn.Module, trained: set[int]) -> int:
    """Parameters and buffers apart from what trains and from adapters, each memory once."""
    tensors: list[Tensor] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in trained and ".fggm_" not in name:
            tensors += [tensor, *_beside(tensor)]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _beside(weight: Tensor) -> list[Tensor]:
    """The tensors that bitsandbytes keeps beside a quantized weight."""
    state = getattr(weight, "quant_state", None)
    found = [getattr(weight, name, None) for name in ("CB", "SCB")]
    for part in (state, getattr(state, "state2", None)):
        found += [] if part is None else list(vars(part).values())
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _score_bytes(layers: Mapping[str, FGGMLayer], config: FGGMConfig, adapter_name: str) -> int:
    """The running sums of a pass, or as much of them as ``score_memory`` holds at a time.

    A criterion that needs a reference, of which the config names none, is taken to get one dataloader.
    """
    criterion = CRITERIA[config.criterion]
    if not criterion.needs_data:
        return 0
    names = [config.reference] if isinstance(config.reference, str) else config.reference
    sources = 1 if names is None else list(names).count("self")
    size = sum(running_bytes(layer, adapter_name, criterion, sources) for layer in layers.values())
    return size if config.score_memory is None else min(size, score_bytes(config.score_memory))


def _token_batches(model: nn.Module, config: FGGMConfig) -> MakeBatch:
    """Batches for a transformers model; one position is padding, as in most batches, since a mask takes memory."""
    base = unwrapped(model)
    has_data = next(base.parameters()).device.type != "meta"
    whole_sample = (config.task_type or task_type_of(base)) == TaskType.SEQ_CLS

    def make_batch(batch_size: int, length: int) -> dict[str, Tensor]:
        tokens = torch.ones(batch_size, length, dtype=torch.int64, device=next(base.parameters()).device)
        mask = tokens.clone()
        mask[-1, -1:] = 0
        labels = torch.zeros_like(tokens[:, 0] if whole_sample else tokens)
        # models look at a mask's values, which are not there on the meta device
        padding = {"attention_mask": mask} if has_data and length > 1 else {}
        return {"input_ids": tokens, "labels": labels, **padding}

    return make_batch
