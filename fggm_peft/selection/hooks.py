"""Hooks on the adapted layers, which pass every call to a ``CallRecorder``. No weight gradient is computed.

A forward hook sees a layer's input ``x`` and puts an identity function behind its output. The backward of that function
receives the gradient ``g`` at the output. It has saved ``x`` through ``save_for_backward``, so that gradient
checkpointing, reentrant or not, neither keeps ``x`` nor counts a sample twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..tuner.target import Target, Targets
from .recorder import CallRecorder, Finish


class LayerHooks:
    """A context manager that hooks the layers of the targets.

    Args:
        targets: the weights whose layers are hooked.
        recorder: receives the calls while it has an open batch.
        input_embeddings: required if blocks are checkpointed: a reentrant checkpoint has no backward unless its input
            requires a gradient.
        uses_tensor_hooks: put the backward hook on the output itself, without a copy. Only if no block is checkpointed,
            because such a hook keeps the input.
    """

    def __init__(
        self,
        targets: Targets,
        recorder: CallRecorder,
        input_embeddings: nn.Module | None = None,
        uses_tensor_hooks: bool = False,
    ):
        self.targets, self.recorder = targets, recorder
        self.input_embeddings, self.uses_tensor_hooks = input_embeddings, uses_tensor_hooks
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # the hooked outputs depend on it, so that there is a graph although every parameter is frozen
        self._anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> LayerHooks:
        for target in self.targets.values():
            if not target.layer.reads_inputs:
                target.layer.observer = partial(self.recorder.record_weight, target)
                continue
            self._handles.append(target.layer.register_forward_hook(self._hook_of(target), with_kwargs=True))
        if self.input_embeddings is not None and self.recorder.sums.needs_backward:
            self._handles.append(self.input_embeddings.register_forward_hook(self._require_grad))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for target in self.targets.values():
            if not target.layer.reads_inputs:
                target.layer.observer = None
        self.recorder.close()

    def _require_grad(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self._anchor.to(output)

    def _hook_of(self, target: Target):
        def hook(module, args, kwargs, output):
            if not self.recorder.is_open:
                return output
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            finish = self.recorder.record_forward(target, x, output)
            return output if finish is None else self._with_backward_hook(target, x, output, finish)

        return hook

    def _with_backward_hook(self, target: Target, x: Tensor, output: Tensor, finish: Finish) -> Tensor:
        """The output, whose gradient will be passed to ``finish`` with the input."""
        whole = _whole(output) if self.uses_tensor_hooks and output.requires_grad else None
        if whole is None:
            return _Identity.apply(output, x, self._anchor, finish)
        shape, version = output.shape, version_of(x)

        def on_gradient(g: Tensor) -> None:
            if version_of(x) != version:
                raise RuntimeError(
                    f"module {target.path}: its input was modified by an inplace operation after the module read it. "
                    "Leave the module out with exclude_modules"
                )
            finish(x, g.reshape(shape))

        whole.register_hook(on_gradient)
        return output


def _whole(output: Tensor) -> Tensor | None:
    """The tensor to hook in order to see the gradient at the output as the layer returned it.

    A linear layer's output may be a view of its product. If the model then writes into the output, it writes into the
    product as well, and the gradient before that write is the right one. None for a view of a part of something.
    """
    base = output._base
    if base is None:
        return output
    if not (base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()):
        return None
    # if an autograd function returned the view, the gradient does not pass through the view's base
    before, view = base.grad_fn, output.grad_fn
    through = before is not None and view is not None and any(node is before for node, _ in view.next_functions)
    return base if through else None


class _Identity(torch.autograd.Function):
    """The identity; its backward calls ``finish(x, gradient)``."""

    @staticmethod
    def forward(ctx, output, x, anchor, finish):
        ctx.finish = finish
        ctx.save_for_backward(x)
        return output.clone()  # a view could not be modified in place, as ReLU(inplace=True) does

    @staticmethod
    def backward(ctx, g):
        ctx.finish(ctx.saved_tensors[0], g)
        return g, None, None, None


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written into; None for inference tensors, which have no counter."""
    return None if tensor.is_inference() else tensor._version
