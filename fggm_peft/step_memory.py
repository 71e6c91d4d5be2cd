"""Memory of one training step, counted without computing it.

The step runs at its real size under torch's ``FakeTensorMode``, whose tensors have a shape but no data. ``_LiveBytes``
adds up the outputs of all operators while they are alive, in forward and backward.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .selection.frozen_model import same_random_state
from .tuner.support import unwrapped

MakeBatch = Callable[[int, int], Mapping[str, Any]]
"""(batch size, sequence length) -> a batch of the model, labels included."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step allocates, in addition to the model and the optimizer.

    Args:
        activations: saved activations, logits, gradients of activations and temporaries at the peak.
        gradients: gradients of the trainable values that exist at the peak.
        most_activations: the maximum of ``activations`` over the step. It may be at another moment than the peak:
            with many trainable values the peak is where all their gradients exist.
    """

    activations: int
    gradients: int
    most_activations: int


def step_memory(
    model: nn.Module, make_batch: MakeBatch, batch_size: int, sequence_length: int, checkpointing: bool
) -> StepMemory:
    """Count one training step, forward and backward. The model is left unchanged.

    A model on the meta device is counted as on a CPU.

    Raises:
        ValueError: the model returns no loss, or the shapes in it depend on data.
    """
    batch = make_batch(batch_size, sequence_length)
    torch.clear_autocast_cache()  # a weight that was cast before would not be counted
    try:
        with same_random_state(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
            twin = copy_with_same_tensors(model, meta_device="cpu").train()
            _set_checkpointing(unwrapped(twin), checkpointing)
            return _count(twin, batch)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the shapes inside a {type(unwrapped(model)).__name__} depend on its data ({error.func}), so a "
            "training step cannot be counted without data"
        ) from error
    finally:
        torch.clear_autocast_cache()  # it holds fake casts of real weights


def copy_with_same_tensors(model: nn.Module, meta_device: str = "meta") -> nn.Module:
    """A copy that can be changed and thrown away. Its tensors share their memory with the original's."""
    twins: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        is_meta = tensor.device.type == "meta"
        data = torch.empty(tensor.shape, dtype=tensor.dtype, device=meta_device) if is_meta else tensor.detach()
        if type(tensor) is nn.Parameter:
            twins[id(tensor)] = nn.Parameter(data, tensor.requires_grad)
        else:  # a quantized weight is frozen, and keeps its class
            twins[id(tensor)] = data if is_meta else tensor
    with _SharedTensors():
        return copy.deepcopy(model, twins)


class _SharedTensors(TorchFunctionMode):
    """Lets ``deepcopy`` keep tensors that are no parameters: buffers, quantization states, offloaded weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is Tensor.__deepcopy__ else function(*args, **(kwargs or {}))


def _count(model: nn.Module, batch: Mapping[str, Any]) -> StepMemory:
    with _LiveBytes() as counter, ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(counter.finish_gradient).remove)
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(model).__name__} returns no loss, so a training step cannot be counted. Pass make_batch=: a "
                "function of (batch size, sequence length) that returns a batch with labels"
            )
        del output
        loss.backward()
    activations, gradients = counter.peak
    return StepMemory(activations, gradients, counter.most_activations)


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operators create, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = (0, 0)
        self.most_activations = 0
        self._alive: dict[int, int] = {}
        self._activations = self._gradients = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return False  # a model reads one bit: whether a mask is all ones (it has padding), or a value is infinite
        inputs = {key for key, _ in _storages((args, kwargs))}
        output = function(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in function._schema.returns):
            for key, storage in _storages(output):
                if key not in inputs and key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    self._activations += storage.nbytes()
                    weakref.finalize(storage, self._free, key).atexit = False
        self.peak = max(self.peak, (self._activations, self._gradients), key=sum)
        self.most_activations = max(self.most_activations, self._activations)
        return output

    def _free(self, key: int) -> None:
        self._activations -= self._alive.pop(key)

    def finish_gradient(self, parameter: nn.Parameter) -> None:
        """Count a gradient as one that remains until the end of the step."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
        parameter.grad = None


def _storages(tree: Any) -> list[tuple[int, torch.UntypedStorage]]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(storage._cdata, storage) for storage in storages]


def _set_checkpointing(model: nn.Module, enabled: bool) -> None:
    if not enabled:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                vars(module)["gradient_checkpointing"] = False
        return
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # transformers' newer name first
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return
    raise ValueError(f"a {type(model).__name__} has no gradient checkpointing; leave checkpointing out")
