"""From the input and the output gradient of each call to per-sample gradients, and into the running sums.

Statistics of inputs are added in forward. Statistics of gradients are added in backward, as soon as all
calls of a layer have their gradient: a layer that is called twice sums its gradients before they are squared.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..core.harm_decay import InputMetric
from ..core.per_sample import GramMatrix, same_memory
from ..core.statistics import Features
from ..tuner.layer_types import FGGMLinear
from ..tuner.target import Target
from .layout import Layout
from .running_sums import RunningSums

Finish = Callable[[Tensor, Tensor], None]
"""Completes a call of a layer in backward; takes its input and the gradient at its output."""


class BatchRecorder:
    """Adds the calls of one batch to running sums.

    Run the forward, then ``backward`` if the sums need it, and ``finish``.
    Consecutive layers with the same input, such as the query and key projections, share its Gram matrix. Only the
    results of the last input are stored. The memory of an input identifies it.

    Args:
        sums: of the targets whose layers are hooked.
        layout: of the batch.
        half: ``[b]``, 0 or 1: the running sum that each sample is added to.
        metrics: module path -> mapping of the layer's inputs, before gradients are computed from them.
        counts: False for a batch that only takes part because other processes need it to.
    """

    def __init__(
        self,
        sums: RunningSums,
        layout: Layout,
        half: Tensor,
        metrics: Mapping[str, InputMetric] | None = None,
        counts: bool = True,
    ):
        self.sums, self.layout, self.half, self.metrics, self.counts = sums, layout, half, metrics or {}, counts
        self._calls: Counter[str] = Counter()  # forward calls of each module
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._in_backward = False
        self._last_gram: tuple[Tensor, GramMatrix] | None = None
        self._last_cleaned: tuple[Tensor, Tensor] | None = None

    def backward(self, log_likelihood: Tensor) -> None:
        """Differentiate the summed log-likelihood, ``[b]``. Forward calls from now on are repeated ones."""
        self._in_backward = True
        log_likelihood.sum().backward()

    def finish(self, batch_index: int) -> None:
        """Add what is left.

        Raises:
            NonFiniteScoreError: a sum is NaN or infinite; names the module and the batch.
        """
        for path in list(self._waiting):  # the output of one of its calls did not reach the loss
            self._add_gradients(self.sums.targets[path])
        self.sums.require_finite(batch_index)

    def record_forward(self, target: Target, x: Tensor) -> Finish | None:
        """Record a forward call of a layer; returns what its backward must call, if the sums need one."""
        if not self._in_backward:  # checkpointing repeats calls in backward; they have been counted
            self._calls[target.path] += 1
            self._add_features(target, x)
        if not self.sums.needs_backward:
            return None
        if self._last_gram is None or not same_memory(self._last_gram[0], x):
            self._last_gram = x, GramMatrix(shared_by=0)
        gram = self._last_gram[1]
        gram.shared_by += 1
        return lambda x, g: self._record_gradient(target, x, g, gram)

    def _record_gradient(self, target: Target, x: Tensor, g: Tensor, gram: GramMatrix) -> None:
        if torch.is_grad_enabled() and g.requires_grad:
            raise RuntimeError(
                f"module {target.path}: the log-likelihood differentiates within itself (create_graph=True), so it has "
                "no per-sample gradients. Remove that term from the log-likelihood."
            )
        waiting, calls = self._waiting[target.path], self._calls[target.path]
        if target.layer.reads_inputs:
            x, g = self._by_sample(target, x), self._cleaned(target, self._by_sample(target, g))
            x = self._mapped_input(target, x)
        waiting.append((x, g))
        if len(waiting) == calls:
            self._add_gradients(target, gram if calls == 1 else None)
        gram.done()

    def _add_gradients(self, target: Target, gram: GramMatrix | None = None) -> None:
        calls = self._waiting.pop(target.path)
        if not target.layer.reads_inputs:
            metric = self.metrics.get(target.path)
            # the gradient of the weight, of one sample; mapping its rows is mapping the inputs
            calls = [(x, (g if metric is None else metric(g))[None]) for x, g in calls]
        elif len(calls[0][0]) != len(self.half):
            calls = [(a[None], b[None]) for x, g in calls for a, b in zip(x, g, strict=True)]
        with torch.autocast(calls[0][1].device.type, enabled=False):  # scores are summed in float32
            self._add(target, "gradient", target.layer.per_sample(calls, gram or GramMatrix()))

    @torch.no_grad()
    def _add_features(self, target: Target, x: Tensor) -> None:
        """Add the statistics of the layer's input."""
        if "input" not in self.sums.sides:
            return
        try:
            values = target.layer.input_features(self._by_sample(target, x))
        except TypeError as error:
            raise ValueError(f"module {target.path}: {error}") from error
        if len(values) != len(self.half):
            values = values.flatten(0, 1)[None]
        padding = self.layout.padding(target.path, values)
        self._add(target, "input", Features(values, None if padding is None else ~padding))

    def _add(self, target: Target, side: str, measured) -> None:
        if self.counts:
            self.sums.add_(target, side, measured, self.half)

    def _by_sample(self, target: Target, x: Tensor) -> Tensor:
        """What a layer received or returned, with the samples first, or calls that all belong to the only sample."""
        x = self.layout.by_sample(target.path, x)
        if len(x) == len(self.half) or not isinstance(target.layer, FGGMLinear):
            return x
        return x.reshape(1, -1, x.shape[-1])

    def _mapped_input(self, target: Target, x: Tensor) -> Tensor:
        """The input, cleaned and mapped by the metric; computed once for layers with the same input."""
        if self._last_cleaned is None or not same_memory(self._last_cleaned[0], x):
            cleaned, metric = self._cleaned(target, x), self.metrics.get(target.path)
            self._last_cleaned = x, cleaned if metric is None else metric(cleaned)
        return self._last_cleaned[1]

    def _cleaned(self, target: Target, tensor: Tensor) -> Tensor:
        """The tensor without the NaN that eager attention leaves at padded positions on the left."""
        padding = self.layout.padding(target.path, tensor)
        if padding is None or not tensor.is_floating_point():
            return tensor
        padded = padding.view(*padding.shape, *[1] * (tensor.dim() - 2))
        return torch.where(padded, tensor.nan_to_num(0.0, 0.0, 0.0), tensor)
