"""``FGGMLayer``: a base layer with the sparse deltas of its adapters; its subclasses are in ``layer_types``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from ..core.errors import AdapterNotSelectedError
from ..core.linear import effective_weight
from ..core.per_sample import GramMatrix, PerSampleGradients
from ..core.ranking import all_finite
from ..core.weight_delta import WeightDelta
from .adapter_state import AdapterState
from .base_weight import BaseWeight
from .merging import merge as merging
from .merging.merge import ModuleMerge
from .merging.sidecar import with_sidecar
from .several.mixed_batches import mixed_batch_forward

Calls = list[tuple[Tensor, Tensor]]
"""For each call of a layer in a batch: its input, and the gradient at its output, samples first."""


class FGGMLayer(nn.Module, AdapterState, BaseWeight):
    """A base layer and its adapters. A subclass says how its type stores, uses and differentiates the weight.

    While adapters are merged into a dense base, ``fggm_originals[adapter]`` holds the entries from before the merge.
    """

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any):
        super().__init__()
        BaseWeight.__init__(self, base_layer, **quantization_kwargs)
        AdapterState.__init__(self)
        self.fggm_originals = BufferDict(persistent=False)
        # base layers that a merge has replaced, oldest first; a list hides them from torch, see _apply
        self._replaced_bases: list[nn.Module] = []

    reads_inputs = True
    """Whether the layer is called with the input that its weight multiplies; otherwise see ``tuner.parameters``."""
    observer: Callable[[], Callable[[Tensor], None] | None] | None = None
    """Called with every forward of a module that uses the weight; may return what receives the weight's gradient."""
    can_decay = False
    """Whether the inputs that the weight multiplies can be observed, for harm decay."""
    is_expert = False
    """Whether the weight is one of a stack, so that the last part of its path is a number."""

    def adapted_forward(self, deltas: list[WeightDelta], x: Tensor, *args, **kwargs) -> Tensor:
        """The output of the base layer with the deltas added to its weight; by default in the additive form."""
        return self.with_deltas(self.base_layer(x, *args, **kwargs), self.active_adapters, x)

    @abstractmethod
    def with_deltas(self, output: Tensor, adapter_names: Sequence[str], x: Tensor) -> Tensor:
        """The base layer's ``output`` for ``x`` plus the products of the deltas, without reading the weight."""

    @abstractmethod
    def per_sample(self, calls: Calls, gram: GramMatrix) -> PerSampleGradients:
        """Per-sample gradients of the weight from the layer's calls in a batch; other layers may share ``gram``."""

    def input_features(self, x: Tensor) -> Tensor:
        """The input of one call as vectors that the weight multiplies, ``[b, t, i]``; by default a ``TypeError``."""
        raise TypeError(f"the columns of {type(self).__name__} are not input features; leave it out of the targets")

    def part(self, parameter: Tensor) -> Tensor:
        """This weight ``[o, i]`` as a view of the module's parameter, or of its gradient."""
        return self.matrix(parameter)

    def forward(self, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Tensor:
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        deltas = self.current_deltas()
        is_plain = self.disable_adapters or self.merged
        if is_plain or (not deltas and not self.needs_weight_for_gradients(x)):
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(deltas, x, *args, **kwargs)

    _mixed_batch_forward = mixed_batch_forward  # PEFT's name

    def current_deltas(self) -> list[WeightDelta]:
        """What the next forward adds to the base weight; adapters that are disabled are unmerged first."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        names = [name for name in self.active_adapters if name in self.granularity]
        awaited = self.fggm_indices.awaited
        for name in names:
            if name in awaited:
                awaited[name].require_whole_file()
            if not self.selected[name] and self.training and torch.is_grad_enabled():
                raise AdapterNotSelectedError(
                    f"adapter {name!r} has no support yet, so there is nothing to train. "
                    "Call fggm_peft.select_parameters(model, dataloader) before training."
                )
            if name in self._selected_in_shards:
                raise RuntimeError(
                    f"adapter {name!r} was selected in a model that was sharded already. Save it, load it with "
                    "PeftModel.from_pretrained(..., is_trainable=True), and shard that model."
                )
        return self.deltas(names)

    # Merging ------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta as a dense tensor, in the shape and orientation of the base layer's weight."""
        delta = self.delta(adapter)
        dense = torch.zeros(self.weight_shape, dtype=delta.values.dtype, device=delta.values.device)
        delta.granularity.add_(dense, delta.indices, delta.values.detach(), delta.scale)
        return self.unmatrix(dense)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_originals: bool = True,
    ) -> None:
        """Merge adapters into the base layer; see ``FGGMModel.merge_adapter`` for the errors.

        Args:
            safe_merge: raise before anything changes if the merged weights are not finite.
            adapter_names: by default the active adapters.
            keep_originals: keep what ``unmerge`` needs to restore the base bit for bit.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fggm_values]
        if not names:
            return
        if self.quantization_backend is None:
            self._merge_dense_(names, safe_merge, keep_originals)
        else:
            replacement, _ = self.quantized_replacement(names, safe_merge)
            if keep_originals:
                self._replaced_bases.append(self.base_layer)
            self._set_base(replacement)
        self.merged_adapters.extend(names)

    def _merge_dense_(self, names: list[str], safe: bool, keep_originals: bool) -> None:
        if safe:
            self._require_finite(names)
        base = self.get_base_layer()
        matrix = self.matrix(base.weight.detach())
        for name in names:
            before, _ = merging.add_to_dense_(matrix, self.delta(name))
            if keep_originals:
                self.fggm_originals[name] = before
        self.write_back_(base.weight.detach(), matrix)

    def _require_finite(self, names: list[str]) -> None:
        matrix = self.matrix(self.get_base_weight())
        for name in names:
            delta = self.delta(name)
            if not all_finite(delta.granularity.added(matrix, delta.indices, delta.values.detach(), delta.scale)):
                raise merging.not_finite_error(name)

    @torch.no_grad()
    def quantized_replacement(self, names: list[str], safe: bool) -> tuple[nn.Module, ModuleMerge]:
        """A new base layer with the deltas merged into it; this layer does not change. See ``merge``."""
        mode = self.quantized_merge[names[0]]
        base, deltas = self.get_base_layer(), [self.delta(name) for name in names]
        if mode == "keep":
            if safe and not all(all_finite(delta.values) for delta in deltas):
                raise merging.not_finite_error(names[0])
            replacement, report = with_sidecar(base, deltas), merging.unchanged(deltas)
        else:
            merging.require_requantizable(self.quantization_backend)
            before = self.get_base_weight().detach()
            after = effective_weight(before.to(torch.promote_types(before.dtype, torch.float32), copy=True), deltas)
            if safe and not all_finite(after):
                raise merging.not_finite_error(names[0])
            replacement = merging.requantized(base, self.quantization_backend, after.to(before.dtype))
            now = self.quantization_backend.get_base_weight(replacement)
            report = merging.compare(now.float() - before.float(), (after - before).float(), "requantized")
        return replacement, report

    def check_merge(self, names: list[str] | None, safe: bool) -> ModuleMerge | None:
        """Raise the errors of ``merge`` without changing anything; returns the loss that mode "auto" decides about."""
        names = self.active_adapters if names is None else names
        names = [name for name in names if name in self.fggm_values and name not in self.merged_adapters]
        if not names:
            return None
        mode = self.quantized_merge[names[0]]
        if self.quantization_backend is None:
            if safe:
                self._require_finite(names)
        elif safe or mode == "auto":
            report = self.quantized_replacement(names, safe)[1]
            return report if mode == "auto" else None
        elif mode == "requantize":
            merging.require_requantizable(self.quantization_backend)  # without the cost of requantizing twice
        return None

    def unmerge(self) -> None:
        """Undo all merges: the base layer is what it was, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.fggm_originals:
                self.restore_(base.weight.detach(), name)
                del self.fggm_originals[name]
        if self._replaced_bases:
            self._set_base(self._replaced_bases[0])
            self._replaced_bases.clear()

    def restore_(self, weight: Tensor, adapter_name: str) -> None:
        """Write the entries from before an adapter's merge back to a stored weight, in place."""
        matrix, originals = self.matrix(weight), self.fggm_originals[adapter_name].to(weight.dtype)
        self.granularity[adapter_name].put_(matrix, self.fggm_indices[adapter_name], originals)
        self.write_back_(weight, matrix)

    def _set_base(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(base_layer, **self._quantization_kwargs)

    # Torch --------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        for base in self._replaced_bases:
            base._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}={len(self.fggm_indices[name])} {granularity.plural}"
            for name, granularity in self.granularity.items()
        )
        form = "effective weight" if self.can_copy_weight() else "additive"  # see core.linear
        return ", ".join(part for part in (adapters, form, quantization_extra_repr(self)) if part)

    def __repr__(self) -> str:
        return "fggm." + super().__repr__()
