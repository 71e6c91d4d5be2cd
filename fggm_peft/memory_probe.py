"""What one training step allocates, counted in small steps and extended to the size that is asked for.

Every tensor that an operator makes is counted from its birth to its end, in forward and backward: what autograd
saves, what checkpointing computes again, logits, temporary weights. A step does the same operators at every size, so
what is alive after each of them is a polynomial in batch size and length -- of degree 1 and 2 -- that a few small
steps determine exactly.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .selection.frozen_model import same_random_state
from .tuner.layer import FGGMLayer
from .tuner.support import unwrapped

_FEW_POSITIONS = 512  # a step this small is taken itself
_BATCH_SIZES = (2, 3)  # one sample takes other operators: nothing is expanded
_LENGTHS = (16, 32, 48)

MakeBatch = Callable[[int, int], Mapping[str, Any]]
"""(batch size, sequence length) -> what the model takes, labels included."""


@dataclass(frozen=True)
class StepMemory:
    """What a step allocates at its peak, beyond what stands in memory before and after it.

    Args:
        activations: bytes of saved activations, logits, gradients of activations and temporaries at the peak.
        gradients: bytes of the trainable values' gradients that are there at the peak.
        most_activations: the most that ``activations`` are at any moment, which need not be the peak: with many
            trainable values that is where all their gradients are there.
    """

    activations: int
    gradients: int
    most_activations: int


def step_memory(
    model: nn.Module, make_batch: MakeBatch, batch_size: int, sequence_length: int, checkpointing: bool
) -> StepMemory:
    """Count one training step, forward and backward; the model is left as it was.

    On the meta device, and where the step is small, it is counted at its own size; else small steps are extended.
    """
    sizes = [(batch_size, sequence_length)]
    if batch_size * sequence_length > _FEW_POSITIONS and next(model.parameters()).device.type != "meta":
        sizes = list(itertools.product(_probed(batch_size, _BATCH_SIZES), _probed(sequence_length, _LENGTHS)))
    with _as_in_training(model, checkpointing), _weightless(model):
        if len(sizes) > 1:
            _copy_weights_(model)
        steps = [_history(model, make_batch(*size)) for size in sizes]
    histories = [torch.tensor(step, dtype=torch.float64) for step in steps]
    if len({len(history) for history in histories}) > 1:  # other operators at another size: extend the peaks alone
        histories = [history[[int(history.sum(1).argmax()), int(history[:, 0].argmax())]] for history in histories]
    weights = [
        _weight(batch_size, b, [size[0] for size in sizes]) * _weight(sequence_length, t, [size[1] for size in sizes])
        for b, t in sizes
    ]
    history = (torch.stack(histories) * torch.tensor(weights, dtype=torch.float64)[:, None, None]).sum(0)
    activations, gradients = history[history.sum(1).argmax()].round().long().tolist()
    return StepMemory(activations, gradients, round(float(history[:, 0].max())))


def _copy_weights_(model: nn.Module) -> None:
    """Let layers copy their weights, as with many positions, whatever the size of the step.

    With few they would do other operators, and no step could be extended to another. A step that is asked for with few
    is counted with the copy of a weight too much. ``as_it_was`` takes the attributes away.
    """
    for module in model.modules():
        if isinstance(module, FGGMLayer):
            vars(module)["positions"] = lambda x: math.inf


def _probed(wanted: int, sizes: Sequence[int]) -> Sequence[int]:
    return sizes if wanted > max(sizes) else (wanted,)


def _weight(wanted: int, size: int, sizes: Sequence[int]) -> float:
    """Lagrange's: how much the value at ``size`` counts for the value at ``wanted``."""
    result = 1.0
    for other in sorted(set(sizes) - {size}):
        result *= (wanted - other) / (size - other)
    return result


def _history(model: nn.Module, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
    """After each operator of a step: bytes that are alive, and bytes of finished gradients."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _LiveBytes() as counter, ExitStack() as stack:
        for parameter in trainable:
            handle = parameter.register_post_accumulate_grad_hook(counter.finish_gradient)
            stack.callback(handle.remove)
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(model).__name__} returns no loss, so a training step cannot be counted. Pass make_batch=: a "
                "function of (batch size, sequence length) that returns a batch with labels"
            )
        del output
        loss.backward()
    return counter.history


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operators make while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[tuple[int, int]] = []
        self._alive: dict[int, int] = {}
        self._bytes = self._gradients = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {key for key, _ in _storages((args, kwargs))}
        output = function(*args, **(kwargs or {}))
        for key, storage in _storages(output):
            if key not in given and key not in self._alive:
                self._alive[key] = storage.nbytes()
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._free, key).atexit = False
        self.history.append((self._bytes, self._gradients))
        return output

    def _free(self, key: int) -> None:
        self._bytes -= self._alive.pop(key)

    def finish_gradient(self, parameter: nn.Parameter) -> None:
        """Count the gradient as one that stays, and let it go: a probe needs no room for it."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None


def _storages(tree: Any) -> list[tuple[int, torch.UntypedStorage]]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(storage._cdata, storage) for storage in storages]


@contextmanager
def _as_in_training(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Training mode, with or without gradient checkpointing; afterwards all is as it was."""
    base = unwrapped(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with same_random_state(), as_it_was(model):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            model.train()
            _set_checkpointing(base, checkpointing)
            with torch.enable_grad():
                yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def _weightless(model: nn.Module) -> Iterator[None]:
    """A model on the meta device goes through its operators as if it were on the CPU, whose attention it then takes;
    nothing is computed. Its tensors must be put back by ``as_it_was``."""
    if next(model.parameters()).device.type != "meta":
        yield
        return
    twins: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for tensors in [held for module in model.modules() for held in (module._parameters, module._buffers)]:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = twins.setdefault(id(tensor), _on_cpu(tensor))
        yield


def _on_cpu(tensor: Tensor) -> Tensor:
    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _set_checkpointing(model: nn.Module, wanted: bool) -> None:
    if wanted:
        enable: Any
        # transformers' names, the newer first
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
        if enable is None:
            raise ValueError(f"a {type(model).__name__} has no gradient checkpointing; leave checkpointing out")
        enable({"use_reentrant": False})
        return
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes, children, hooks and mode, and every parameter the
    ``requires_grad``, that it had before."""
    modules = [(module, _copied(vars(module))) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, attributes in modules:
            for name, value in attributes.items():
                if isinstance(value, dict) and isinstance(there := vars(module).get(name), dict):
                    there.clear()  # in place: handles of hooks hold the dict itself
                    there.update(value)
                    attributes[name] = there
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, dict) else value for name, value in attributes.items()}


@contextmanager
def probed_supports(layers: Mapping[str, FGGMLayer], adapter_name: str, units: Sequence[int]) -> Iterator[None]:
    """Supports of so many units for an adapter that has none yet, whose values take no memory; gone afterwards."""
    kept: list[tuple[FGGMLayer, Tensor, bool]] = []
    try:
        for layer, k in zip(layers.values(), units, strict=True):
            kept.append((layer, layer.fggm_indices[adapter_name], layer.selected[adapter_name]))
            _lay_out_(layer, adapter_name, k)
        yield
    finally:
        for layer, indices, selected in kept:
            layer.fggm_indices[adapter_name] = indices
            for parameter in layer.trained(adapter_name):
                shape = layer.granularity[adapter_name].values_shape(layer.weight_shape, 0)
                parameter.data = parameter.data.new_empty(shape if parameter.dim() == len(shape) else 0)
            layer.selected[adapter_name] = selected


def _lay_out_(layer: FGGMLayer, adapter_name: str, k: int) -> None:
    granularity, indices = layer.granularity[adapter_name], layer.fggm_indices[adapter_name]
    places = torch.arange(k, dtype=torch.int64, device=indices.device) * granularity.units(layer.weight_shape)
    layer.fggm_indices[adapter_name] = (places // max(1, k)).to(indices.dtype)
    values = layer.fggm_values[adapter_name]
    shapes = [granularity.values_shape(layer.weight_shape, k), (k,)]
    for parameter, shape in zip(layer.trained(adapter_name), shapes, strict=False):
        parameter.data = torch.zeros((), dtype=values.dtype, device=values.device).expand(shape)  # one zero for all
    layer.selected[adapter_name] = True
