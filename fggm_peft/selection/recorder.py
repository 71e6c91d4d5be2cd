"""From the input and the output gradient of each call to per-sample gradients, and into the running sums.

Statistics of inputs and outputs are added in forward. Statistics of gradients are added in backward, as soon as all
calls of a layer have their gradient: a layer that is called twice sums its gradients before they are squared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.harm_decay import InputMetric
from ..core.per_sample import GramMatrix, same_memory
from ..core.statistics import Batch, Features
from ..tuner.layer_types import FGGMLinear
from ..tuner.target import Target
from .layout import Layout
from .running_sums import RunningSums

Finish = Callable[[Tensor, Tensor], None]
"""Completes a call of a layer in backward; takes its input and the gradient at its output."""


_NOTHING = torch.empty(0, 0)


@dataclass
class _OpenBatch:
    """One batch, and what consecutive layers with the same input share in it, such as the query and key projections.

    Only the results of the last input are stored. The memory of an input identifies it.
    """

    batch: Batch
    layout: Layout
    counts: bool
    calls: Counter[str] = field(default_factory=Counter)  # forward calls of each module
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    in_backward: bool = False
    last_gram: tuple[Tensor, GramMatrix] | None = None
    last_cleaned: tuple[Tensor, Tensor] | None = None

    def gram(self, x: Tensor) -> GramMatrix:
        """The Gram matrix of an input ``[b, t, i]``. It is computed when a layer needs it."""
        if self.last_gram is None or not same_memory(self.last_gram[0], x):
            self.last_gram = x, GramMatrix(shared_by=0)
        self.last_gram[1].shared_by += 1
        return self.last_gram[1]

    def cleaned_input(self, path: str, x: Tensor, metric: InputMetric | None = None) -> Tensor:
        """``cleaned``, and mapped by the metric; computed once for layers with the same input."""
        if self.last_cleaned is None or not same_memory(self.last_cleaned[0], x):
            cleaned = self.cleaned(path, x)
            self.last_cleaned = x, cleaned if metric is None else metric(cleaned)
        return self.last_cleaned[1]

    def cleaned(self, path: str, tensor: Tensor) -> Tensor:
        """The tensor without the NaN that eager attention leaves at padded positions on the left."""
        padding = self.layout.padding(path, tensor)
        if padding is None or not tensor.is_floating_point():
            return tensor
        padded = padding.view(*padding.shape, *[1] * (tensor.dim() - 2))
        return torch.where(padded, tensor.nan_to_num(0.0, 0.0, 0.0), tensor)


class CallRecorder:
    """Adds the calls of one batch after the other to running sums.

    For each batch call ``open``, run the forward, then ``backward`` (if the sums need it) and ``finish``.

    Args:
        sums: of the targets whose layers are hooked.
        metrics: module path -> mapping of the layer's inputs, before gradients are computed from them.
    """

    def __init__(self, sums: RunningSums, metrics: Mapping[str, InputMetric] | None = None):
        self.sums, self.metrics = sums, metrics or {}
        self._open: _OpenBatch | None = None

    @property
    def is_open(self) -> bool:
        return self._open is not None

    @property
    def _current(self) -> _OpenBatch:
        assert self._open is not None
        return self._open

    def open(self, batch: Batch, layout: Layout, counts: bool = True) -> None:
        """Start a batch.

        Args:
            layout: of the batch.
            counts: False for a batch that only takes part because other processes need it to.
        """
        self.close()
        self._open = _OpenBatch(batch, layout, counts)

    def backward(self, log_likelihood: Tensor) -> None:
        """Differentiate the summed log-likelihood, ``[b]``. Forward calls from now on are repeated ones."""
        self._current.in_backward = True
        log_likelihood.sum().backward()

    def finish(self, batch_index: int) -> None:
        """Finish a batch.

        Raises:
            NonFiniteScoreError: a sum is NaN or infinite; names the module and the batch.
        """
        for path in list(self._current.waiting):  # the output of one of its calls did not reach the loss
            self._add_gradients(self.sums.targets[path])
        self.sums.require_finite(batch_index)
        self.close()

    def close(self) -> None:
        """Forget the batch."""
        self._open = None

    # One call of a layer ----------------------------------------------------------------------------

    def record_forward(self, target: Target, x: Tensor, output: Tensor) -> Finish | None:
        """Record a forward call; returns what its backward must call, if the sums need one."""
        if not self._current.in_backward:  # checkpointing repeats calls in backward; they have been counted
            self._current.calls[target.path] += 1
            self._add_features(target, x, output)
        if not self.sums.needs_backward:
            return None
        gram = self._current.gram(x)
        return lambda x, g: self._record_gradient(target, x, g, gram)

    def _record_gradient(self, target: Target, x: Tensor, g: Tensor, gram: GramMatrix) -> None:
        if torch.is_grad_enabled() and g.requires_grad:
            raise RuntimeError(
                f"module {target.path}: the log-likelihood differentiates within itself (create_graph=True), so it has "
                "no per-sample gradients. Remove that term from the log-likelihood."
            )
        current = self._current
        waiting, calls = current.waiting[target.path], current.calls[target.path]
        if target.layer.reads_inputs:
            path = target.path
            x, g = self._by_sample(target, x), self._by_sample(target, g)
            x, g = current.cleaned_input(path, x, self.metrics.get(path)), current.cleaned(path, g)
        waiting.append((x, g))
        if len(waiting) == calls:
            self._add_gradients(target, gram if calls == 1 else None)
        gram.done()

    def record_weight(self, target: Target) -> Callable[[Tensor], None] | None:
        """Record a call of a module that uses the weight, without inputs; returns what takes the weight's gradient."""
        if not self.is_open:
            return None
        finish = self.record_forward(target, _NOTHING, _NOTHING)
        return None if finish is None else lambda g: finish(_NOTHING, g)

    def _add_gradients(self, target: Target, gram: GramMatrix | None = None) -> None:
        calls = self._current.waiting.pop(target.path)
        if not target.layer.reads_inputs:
            calls = [(x, g[None]) for x, g in calls]  # the gradient of the weight, of one sample
        elif len(calls[0][0]) != len(self._current.batch.half):
            calls = [(a[None], b[None]) for x, g in calls for a, b in zip(x, g, strict=True)]
        with torch.autocast(calls[0][1].device.type, enabled=False):  # scores are summed in float32
            self._add(target, "gradient", target.layer.per_sample(calls, gram or GramMatrix()))

    @torch.no_grad()
    def _add_features(self, target: Target, x: Tensor, output: Tensor) -> None:
        """Add the statistics of the layer's input and output."""
        layer, layout = target.layer, self._current.layout
        for side in self.sums.sides - {"gradient"}:
            try:
                if side == "input":
                    values = layer.input_features(self._by_sample(target, x))
                else:
                    values = layer.output_features(self._by_sample(target, output.detach()))
            except TypeError as error:
                raise ValueError(f"module {target.path}: {error}") from error
            if len(values) != len(self._current.batch.half):
                values = values.flatten(0, 1)[None]
            padding = layout.padding(target.path, values)
            self._add(target, side, Features(values, None if padding is None else ~padding))

    def _add(self, target: Target, side: str, measured) -> None:
        if self._current.counts:
            self.sums.add_(target, side, measured, self._current.batch)

    def _by_sample(self, target: Target, x: Tensor) -> Tensor:
        """What a layer received or returned, with the samples first, or calls that all belong to the only sample."""
        x = self._current.layout.by_sample(target.path, x)
        if len(x) == len(self._current.batch.half) or not isinstance(target.layer, FGGMLinear):
            return x
        return x.reshape(1, -1, x.shape[-1])
