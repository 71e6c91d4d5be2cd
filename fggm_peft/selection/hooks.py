"""Hooks on the adapted layers, which pass every call to a ``BatchRecorder``. No weight gradient is computed.

A forward hook sees a layer's input ``x`` and puts an identity function behind its output. The backward of that function
receives the gradient ``g`` at the output. It has saved ``x`` through ``save_for_backward``, so that gradient
checkpointing, reentrant or not, neither keeps ``x`` nor counts a sample twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..tuner.target import Target, Targets
from .recorder import BatchRecorder

_NOTHING = torch.empty(0, 0)


class LayerHooks:
    """A context manager that passes the calls of the targets' layers to its ``recorder``, unless that is None.

    Args:
        targets: the weights whose layers are hooked.
        input_embeddings: required if blocks are checkpointed: a reentrant checkpoint has no backward unless its input
            requires a gradient.
    """

    def __init__(self, targets: Targets, input_embeddings: nn.Module | None = None):
        self.targets, self.input_embeddings = targets, input_embeddings
        self.recorder: BatchRecorder | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # the hooked outputs depend on it, so that there is a graph although every parameter is frozen
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> LayerHooks:
        for target in self.targets.values():
            if target.layer.reads_inputs:
                hook = target.layer.register_forward_hook(partial(self._record, target), with_kwargs=True)
                self._handles.append(hook)
            else:
                target.layer.observer = partial(self._record_weight, target)
        if self.input_embeddings is not None:
            self._handles.append(self.input_embeddings.register_forward_hook(self._require_grad))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        for target in self.targets.values():
            if not target.layer.reads_inputs:
                target.layer.observer = None

    def _require_grad(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self._anchor.to(output)

    def _record(self, target: Target, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if self.recorder is None:
            return None
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        finish = self.recorder.record_forward(target, x)
        return None if finish is None else _Identity.apply(output, x, self._anchor, finish)

    def _record_weight(self, target: Target) -> Callable[[Tensor], None] | None:
        """Record a call of a module that uses the weight. Returns the function to call with the weight's gradient."""
        finish = None if self.recorder is None else self.recorder.record_forward(target, _NOTHING)
        return None if finish is None else partial(finish, _NOTHING)


class _Identity(torch.autograd.Function):
    """The identity; its backward calls ``finish(x, gradient)``."""

    @staticmethod
    def forward(ctx, output, x, anchor, finish):
        ctx.finish = finish
        ctx.save_for_backward(x)
        if output._is_view():  # autograd would copy the gradient of a view that is modified in place
            return output.clone()
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, g):
        ctx.finish(ctx.saved_tensors[0], g)
        return g, None, None, None
