"""Collects statistics from the passes of a frozen model, without any weight gradient.

Those of inputs and outputs are taken as the forward goes by. For those of gradients a forward hook on every adapted
layer puts an identity function behind the layer's output. Its backward sees the gradient ``g`` there and has saved the
input ``x`` through ``save_for_backward``, so that gradient checkpointing of either kind neither keeps x nor counts a
sample twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.errors import NonFiniteScoreError
from ..core.per_sample import (
    DigestedGradients,
    GramDigest,
    GramMatrix,
    InputDigest,
    LinearGradients,
    PerSampleGradients,
    RowGradients,
    gram_is_cheaper,
    same_memory,
)
from ..core.sketch import Sketch, SketchDigest, SketchedGradients, sketch_is_cheaper
from ..core.statistics import STATISTICS, Batch, Features, Statistic
from ..tuner.layer import FGGMLayer
from ..tuner.layer_types import FGGMLinear

Report = Callable[[Tensor | None, Tensor], None]
"""What takes what was kept of an input, and the gradient at the output."""

Sums = dict[str, dict[str, Tensor]]
"""Module path -> statistic -> ``[2, size]`` float32, a running sum for each half of the samples."""


class CalledAgainError(RuntimeError):
    """A layer of whose input only a digest is left was called once more in one forward: begin the batch again."""


class ScoreCollector:
    """Running statistics of the layers it hooks, in two halves of the samples.

    Use as a context manager; on leaving, no hook is left. For each batch call ``begin``, run the forward,
    then ``backward`` (if ``needs_backward``) and ``end``.

    Args:
        layers: module path -> layer.
        adapter_name: whose granularity decides the kind of scores.
        statistics: names of what to gather; only that is.
        input_embeddings: given if blocks are checkpointed: the reentrant kind of checkpoint has no
            backward unless its input requires grad.
        sketch: estimates row and column scores of layers whose gradients are products of x and g; without, and for
            other layers (embeddings, grouped convolutions), they are exact.
        hooks_tensors: no block is checkpointed, so that hooks may hold on to inputs; that saves a copy of every output.
        digests: keep no more of inputs than row scores need. Whoever sets it catches ``CalledAgainError``: gradients
            of several calls are summed before they are squared, and digests do not add up.
    """

    listens = True  # False lets forward passes by that are no part of the batch

    def __init__(
        self,
        layers: Mapping[str, FGGMLayer],
        adapter_name: str,
        statistics: Sequence[str] = ("fisher",),
        input_embeddings: nn.Module | None = None,
        sketch: Sketch | None = None,
        hooks_tensors: bool = False,
        digests: bool = False,
    ):
        self.layers, self.adapter_name, self.input_embeddings = layers, adapter_name, input_embeddings
        self.sketch, self.hooks_tensors = sketch, hooks_tensors
        entries = {name: STATISTICS[name] for name in statistics}
        self.statistics = entries
        self.of_gradients = {name: entry for name, entry in entries.items() if entry.looks_at == "gradient"}
        self.of_features = {name: entry for name, entry in entries.items() if entry.looks_at != "gradient"}
        # a batch that is begun again has been counted where it was looked at in forward
        self.digests = digests and not self.of_features and all(entry.has_sketch for entry in entries.values())
        self.sums: Sums = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # the hooked outputs hang on it, so that there is a graph although every parameter is frozen
        self._anchor = torch.zeros((), requires_grad=True)
        self._batch: Batch | None = None

    @property
    def needs_backward(self) -> bool:
        return bool(self.of_gradients)

    def __enter__(self) -> ScoreCollector:
        for name, layer in self.layers.items():
            granularity = layer.granularity[self.adapter_name]
            device = layer.fggm_indices[self.adapter_name].device
            self.sums[name] = {
                key: torch.zeros(2, entry.size(granularity, layer.weight_shape), device=device)
                for key, entry in self.statistics.items()
            }
            self._handles.append(layer.register_forward_hook(self._make_hook(name), with_kwargs=True))
        if self.input_embeddings is not None and self.needs_backward:
            self._handles.append(self.input_embeddings.register_forward_hook(self._require_grad))
        return self

    def _require_grad(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + self._anchor.to(output)

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget_batch()

    def begin(self, batch: Batch, counts: bool = True) -> None:
        """Start a batch.

        Args:
            counts: False for one that is only gone through, because other ranks need this one to.
        """
        self._forget_batch()
        padding = batch.padding if batch.padding is not None and bool(batch.padding.any()) else None
        self._batch, self._counts = replace(batch, padding=padding), counts

    def backward(self, log_likelihood: Tensor) -> None:
        """Differentiate the summed log-likelihood, ``[b]``, collecting scores on the way."""
        self.backward_begins()
        log_likelihood.sum().backward()

    def backward_begins(self) -> None:
        """What is called from now on in this batch repeats calls that were counted."""
        self._in_backward = True

    def end(self, batch_index: int) -> None:
        """Finish a batch.

        Raises:
            NonFiniteScoreError: a score is NaN or infinite; names the module and the batch.
        """
        for name, seen in self._seen.items():
            if seen:  # a call whose output did not reach the loss left these waiting
                self._add(name)
        totals = torch.stack(
            [torch.stack([sums.sum() for sums in of_module.values()]).sum().cpu() for of_module in self.sums.values()]
        )
        if not torch.isfinite(totals).all():
            name = list(self.sums)[int((~torch.isfinite(totals)).nonzero()[0])]
            raise NonFiniteScoreError(
                f"the scores of module {name} became NaN or infinite in batch {batch_index}. Look at that "
                "batch; a float16 model may need bfloat16 or float32 for the selection pass."
            )
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._in_backward = False
        self._batch = None
        self._calls = dict.fromkeys(self.layers, 0)
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        self._last_input: tuple[Tensor, GramMatrix] | None = None
        self._last_digest: tuple[Tensor, int | None, InputDigest] | None = None
        self._last_cleaned: tuple[Tensor, Tensor] | None = None
        if self.sketch is not None:
            self.sketch.forget()

    def _make_hook(self, name: str):
        def hook(module, args, kwargs, output):
            if self._batch is None or not self.listens:
                return output
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            if not self._in_backward:  # checkpointing repeats calls in backward; they have been counted
                self._calls[name] += 1
                self._add_features(name, x, output)
            if not self.needs_backward:
                return output
            return self._tapped(name, output, *self._reporter(name, x, output))

        return hook

    def _reporter(self, name: str, x: Tensor, output: Tensor) -> tuple[Tensor | None, Report]:
        """What of an input has to be kept for backward, and what takes that and the gradient at the output."""
        digest = self._digest(name, x, output)
        if digest is not None:
            return None, lambda _, g: self.record_digest(name, digest, g)
        gram = self._gram_of(x)
        return x, lambda x, g: self.record(name, x, g, gram)

    def _tapped(self, name: str, output: Tensor, kept: Tensor | None, report: Report) -> Tensor:
        """The output, whose gradient will be reported together with what is kept."""
        held = _whole(output) if self.hooks_tensors and output.requires_grad else None
        if held is None:
            return _Tap.apply(output, kept, self._anchor, report)
        shape, version = output.shape, None if kept is None else _version(kept)

        def on_gradient(g: Tensor) -> None:
            if kept is not None and _version(kept) != version:
                raise RuntimeError(
                    f"module {name}: its input was modified by an inplace operation after it was read. Leave the "
                    "module out with exclude_modules, or choose rows"
                )
            report(kept, g.reshape(shape))

        held.register_hook(on_gradient)
        return output

    @torch.no_grad()
    def _digest(self, name: str, x: Tensor, output: Tensor) -> InputDigest | None:
        """What will be needed of an input, one for consecutive layers with one input; None if that is all of it."""
        layer = self.layers[name]
        takes_digest = isinstance(layer, FGGMLinear) and layer.granularity[self.adapter_name].takes_digest
        if not (self.digests and takes_digest):
            return None
        if self._calls[name] > 1 and not self._in_backward:
            self.digests = False
            raise CalledAgainError(f"module {name} is called several times in one forward")
        last, version = self._last_digest, _version(x)
        if last is None or not same_memory(last[0], x) or last[1] != version:
            with torch.autocast(x.device.type, enabled=False):
                digest = self._new_digest(name, self._by_sample(name, self._cleaned(layer.input_features(x))), output)
            self._last_digest = None if digest is None else (x, version, digest)
        return None if self._last_digest is None else self._last_digest[2]

    def _new_digest(self, name: str, x: Tensor, output: Tensor) -> InputDigest | None:
        assert self._batch is not None
        (_, positions, inputs), outputs = x.shape, output.shape[-1]
        if self.sketch is not None and sketch_is_cheaper(positions, outputs, inputs, self.sketch.size):
            return SketchDigest(x, self.sketch, self._samples(), name)
        return GramDigest(x) if gram_is_cheaper(positions, outputs, inputs) else None

    def record_digest(self, name: str, digest: InputDigest, g: Tensor) -> None:
        """Take what one call of a layer got as gradient at its output."""
        _require_first_order(name, g)
        with torch.autocast(g.device.type, enabled=False):
            g = self._by_sample(name, self.layers[name].output_features(self._cleaned(g)))
            self._add_to(name, self.of_gradients, DigestedGradients(digest, g))

    def _samples(self) -> range:
        """The numbers of the batch's samples, over all processes."""
        assert self._batch is not None
        return range(self._batch.first, self._batch.first + len(self._batch.half))

    def _gram_of(self, x: Tensor) -> GramMatrix:
        """The Gram matrix of an input, one for consecutive layers with one input; computed when asked for."""
        if self._last_input is None or not same_memory(self._last_input[0], x):
            self._last_input = x, GramMatrix(shared_by=0)
        self._last_input[1].shared_by += 1
        return self._last_input[1]

    def record(self, name: str, x: Tensor, g: Tensor, gram: GramMatrix) -> None:
        """Take what one call of a layer got as input and as gradient at its output."""
        _require_first_order(name, g)
        self._seen[name].append((self._cleaned(x, cache=True), self._cleaned(g)))
        # a layer called twice (shared weights) sums its gradients before they are squared
        if len(self._seen[name]) == self._calls[name]:
            self._add(name, gram if self._calls[name] == 1 else None)
        gram.done()

    def _add(self, name: str, gram: GramMatrix | None = None) -> None:
        layer = self.layers[name]
        calls = [(self._by_sample(name, x), self._by_sample(name, g)) for x, g in self._seen[name]]
        with torch.autocast(calls[0][1].device.type, enabled=False):  # scores are summed in float32
            gradients = layer.per_sample(calls, gram or GramMatrix())
            self._add_to(name, self.of_gradients, self._sketched(name, gradients))
        self._seen[name] = []

    def _sketched(self, name: str, gradients: PerSampleGradients) -> PerSampleGradients:
        if self.sketch is None or not isinstance(gradients, LinearGradients):
            return gradients
        return SketchedGradients(gradients, self.sketch, self._samples(), name)

    def _add_to(self, name: str, statistics: Mapping[str, Statistic], seen: RowGradients | Features) -> None:
        assert self._batch is not None
        if not self._counts:
            return
        granularity = self.layers[name].granularity[self.adapter_name]
        for key, statistic in statistics.items():
            sums = self.sums[name][key]
            statistic.add_(sums, granularity, seen, replace(self._batch, half=self._batch.half.to(sums.device)))

    @torch.no_grad()
    def _add_features(self, name: str, x: Tensor, output: Tensor) -> None:
        layer = self.layers[name]
        for key, statistic in self.of_features.items():
            of_input = statistic.looks_at == "input"
            try:
                values = layer.input_features(x) if of_input else layer.output_features(output.detach())
            except TypeError as error:
                raise ValueError(f"module {name}: {error}") from error
            values, real = self._by_sample(name, values), None
            if self._batch is not None and (padding := self._batch.padding) is not None:
                real = ~padding.to(values.device) if values.shape[:2] == padding.shape else None
            self._add_to(name, {key: statistic}, Features(values, real))

    def _by_sample(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with one entry for each sample in its first dimension."""
        assert self._batch is not None
        samples = len(self._batch.half)
        if len(tensor) == samples:
            return tensor
        if samples == 1 and isinstance(self.layers[name], FGGMLinear):
            return tensor.reshape(1, -1, tensor.shape[-1])
        raise ValueError(
            f"module {name} was called with a first dimension of {len(tensor)} in a batch of {samples} samples, so "
            "its gradient cannot be split into samples. Use a dataloader with batch size 1, or exclude_modules."
        )

    def _cleaned(self, tensor: Tensor, cache: bool = False) -> Tensor:
        """``tensor`` without the NaN that left-padded eager attention can leave at padded positions."""
        padding = None if self._batch is None else self._batch.padding
        if padding is None or tensor.shape[:2] != padding.shape or not tensor.is_floating_point():
            return tensor
        if cache and self._last_cleaned is not None and same_memory(self._last_cleaned[0], tensor):
            return self._last_cleaned[1]
        where = padding.to(tensor.device).view(*padding.shape, *[1] * (tensor.dim() - 2))
        cleaned = torch.where(where, tensor.nan_to_num(0.0, 0.0, 0.0), tensor)
        if cache:
            self._last_cleaned = tensor, cleaned
        return cleaned


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written into; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _require_first_order(name: str, g: Tensor) -> None:
    if torch.is_grad_enabled() and g.requires_grad:
        raise RuntimeError(
            f"module {name}: the log-likelihood differentiates within itself (create_graph=True), of which no "
            "per-sample gradients can be had. Leave that term out of it."
        )


def _whole(output: Tensor) -> Tensor | None:
    """What a hook on a layer's output is put on, so that it sees the gradient at the output as the layer left it.

    A linear layer's output may be a view of its product; the model may then write into it, and with it into the
    product, whose gradient from before that is the one to see. None for a view of anything but the output alone.
    """
    base = output._base
    if base is None:
        return output
    if not (base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()):
        return None
    # of an autograd function that returns a view, the gradient does not pass through the view's base
    before, view = base.grad_fn, output.grad_fn
    through = before is not None and view is not None and any(node is before for node, _ in view.next_functions)
    return base if through else None


class _Tap(torch.autograd.Function):
    """The identity; its backward reports ``(x, gradient)``."""

    @staticmethod
    def forward(ctx, output, x, anchor, report):
        ctx.report = report
        ctx.save_for_backward(x)
        return output.clone()  # a view could not be modified in place, as ReLU(inplace=True) does

    @staticmethod
    def backward(ctx, g):
        ctx.report(ctx.saved_tensors[0], g)
        return g, None, None, None
