"""``FGGMLayer``: one targeted layer with its sparse deltas, whatever its base is quantized with.

What depends on the layer's type (how it stores and uses its weight) is in ``layer_types``; what
depends on the quantization comes from PEFT's quantization backends; what depends on the kind of
support is a ``Granularity``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.errors import AdapterNotSelectedError
from ..core.granularity import Granularity, Shape
from ..core.index_codec import index_dtype
from ..core.linear import effective_weight
from ..core.per_sample import GramMatrix, PerSampleGradients
from ..core.weight_delta import WeightDelta
from .config import FGGMConfig
from .files.indices import SupportIndices
from .hosts.bitsandbytes import recover_quantization_state
from .hosts.offloading import execution_device, is_offloaded, kept_weight
from .hosts.sharding import whole
from .merging.merge import merge_dense_, merge_quantized
from .merging.report import ModuleMerge
from .merging.sidecar import KEPT, KeptDeltaHook
from .several.mixed_batches import mixed_batch_forward

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# torchao's names for it, of its two families of tensors
_INPUT_QUANTIZATION = ("act_quant_kwargs", "activation_quantization")

Calls = list[tuple[Tensor, Tensor]]


class FGGMLayer(nn.Module, BaseTunerLayer):
    """A base layer and, for each adapter, a support and the values on it.

    State, all of it where torch can see it:

    - ``fggm_values[adapter]``: trainable, ``[k, in]`` for rows, ``[out, k]`` for columns, ``[k]`` for elements;
    - ``fggm_indices[adapter]``: ``[k]`` int32 (int64 where ``out * in`` reaches 2**31), sorted, unique;
      elements are flat indices ``o * in + i``;
    - ``fggm_bias[adapter]``: ``[k]``, the bias entries of chosen rows, if the config asks for them;
    - ``fggm_originals[adapter]``, ``fggm_original_bias[adapter]``: while merged into a dense base, the
      entries as they were.
    """

    adapter_layer_names = ("fggm_values", "fggm_bias")
    other_param_names = ("fggm_indices", "scaling", "granularity", "selected", "quantized_merge", "padded_sizes")

    def __init__(self, base_layer: nn.Module, **quantization_kwargs: Any):
        super().__init__()
        self.base_layer = base_layer
        self.fggm_values = nn.ParameterDict()
        self.fggm_bias = nn.ParameterDict()
        self.fggm_originals = BufferDict(persistent=False)
        self.fggm_original_bias = BufferDict(persistent=False)
        self.scaling: dict[str, float] = {}
        self.granularity: dict[str, Granularity] = {}
        self.quantized_merge: dict[str, str] = {}
        self.selected: dict[str, bool] = {}  # False until the support is known
        self.fggm_indices = SupportIndices(self.selected)
        for part, places in self.fggm_indices.parts.items():
            setattr(self, f"fggm_{part}", places)
        self._quantization_kwargs = quantization_kwargs
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.padded_sizes: dict[str, int] = {}  # units that a support is padded to, see several.hotswap
        # bases that a merge has replaced, oldest first; a list hides them from torch, see _apply
        self._replaced_bases: list[nn.Module] = []
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._trains_nothing: set[str] = set()  # adapters that would train here if their support were not empty
        self._selected_in_shards: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters = []

    # What a layer type has to say ---------------------------------------------------------------

    @property
    @abstractmethod
    def weight_shape(self) -> Shape:
        """``(o, i)`` of the weight as a matrix."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as ``[o, i]``: a view where the memory layout allows one."""

    @abstractmethod
    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of ``matrix``: ``[o, i]`` in the orientation the base layer stores."""

    @abstractmethod
    def adapted_forward(self, deltas: list[WeightDelta], x: Tensor, *args, **kwargs) -> Tensor:
        """What the base layer would compute if the deltas were part of its weight."""

    @abstractmethod
    def with_deltas(self, output: Tensor, adapter_names: Sequence[str], x: Tensor) -> Tensor:
        """The base layer's ``output`` for ``x`` and what the adapters add to it; the weight is not needed."""

    @abstractmethod
    def per_sample(self, calls: Calls, gram: GramMatrix) -> PerSampleGradients:
        """Per-sample gradients of the weight.

        Args:
            calls: for each call of the layer in this batch its input and the gradient at its output, the
                first dimension being the sample.
            gram: Gram matrix of the input, which other layers may share.
        """

    @abstractmethod
    def input_features(self, x: Tensor) -> Tensor:
        """The input of one call as vectors that the weight multiplies, ``[b, t, i]``; ``TypeError`` if it has none."""

    @abstractmethod
    def output_features(self, output: Tensor) -> Tensor:
        """The output of one call as vectors ``[b, t, o]``; ``TypeError`` if its features are no rows."""

    def positions(self, x: Tensor) -> int:
        """How many rows of ``[n, i]`` the input stands for."""
        return x.numel() // max(1, x.shape[-1])

    # Adapters -----------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: FGGMConfig, inference_mode: bool = False) -> None:
        """Add an adapter with an empty support: it changes nothing, trains nothing and costs nothing."""
        granularity = config.granularity
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if config.training_dtype is not None:
            dtype = getattr(torch, config.training_dtype)
        floating = dtype is not None and dtype.is_floating_point
        options: dict[str, Any] = {"device": device, "dtype": dtype if floating else torch.float32}
        o, i = self.weight_shape
        empty = torch.empty(granularity.values_shape(self.weight_shape, 0), **options)
        self.fggm_values[adapter_name] = nn.Parameter(empty)
        self.fggm_indices[adapter_name] = torch.empty(0, dtype=index_dtype(o * i), device=device)
        if config.bias == "fggm_only" and getattr(self.get_base_layer(), "bias", None) is not None:
            self.fggm_bias[adapter_name] = nn.Parameter(torch.empty(0, **options))
        self.granularity[adapter_name] = granularity
        self.quantized_merge[adapter_name] = config.quantized_merge
        self.scaling[adapter_name] = 1.0
        self.selected[adapter_name] = False
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def trained(self, adapter_name: str) -> list[nn.Parameter]:
        """What an adapter trains here: its values, and the bias entries of chosen rows if it has them."""
        return [held[adapter_name] for held in (self.fggm_values, self.fggm_bias) if adapter_name in held]

    def nothing(self, adapter_name: str) -> dict[str, Tensor]:
        """The tensors of an adapter whose support is empty: indices, values and, if it has them, bias entries."""
        held = {"indices": self.fggm_indices, "values": self.fggm_values, "bias": self.fggm_bias}
        found = {part: tensors[adapter_name].detach()[:0] for part, tensors in held.items() if adapter_name in tensors}
        shape = self.granularity[adapter_name].values_shape(self.weight_shape, 0)
        return {**found, "values": found["values"].new_zeros(shape)}

    def resize_(self, adapter_name: str, k: int, dtype: torch.dtype | None = None) -> None:
        """Make room for ``k`` units, perhaps of another dtype; what stood there is gone unless nothing changes.

        The parameters stay the same objects, so that an optimizer that holds them already trains the new sizes.
        """
        shape = self.granularity[adapter_name].values_shape(self.weight_shape, k)
        for parameters, size in ((self.fggm_values, shape), (self.fggm_bias, (k,))):
            values = parameters.get(adapter_name, None)
            if values is not None and (values.shape != size or dtype not in (None, values.dtype)):
                trains = values.requires_grad or adapter_name in self._trains_nothing
                if isinstance(values, DTensor):  # FSDP2 keeps the old one, so the new is only there to be saved
                    values = torch.zeros(size, dtype=values.dtype, device=values.device)
                    parameters[adapter_name] = nn.Parameter(values, requires_grad=trains)
                    self._selected_in_shards.add(adapter_name)
                else:
                    values.grad = None
                    values.data = values.data.new_zeros(size, dtype=dtype)
                    values.requires_grad_(trains)
        if self.fggm_indices[adapter_name].shape != (k,):
            self.fggm_indices[adapter_name] = self.fggm_indices[adapter_name].new_zeros(k)

    def set_support(self, adapter_name: str, indices: Tensor, generator: torch.Generator | None = None) -> None:
        """Let the given units move, starting from zero.

        Args:
            indices: ``[k]`` integers, sorted, unique, in range.
            generator: draws normal starting values instead of zeros; only for tests.
        """
        self.resize_(adapter_name, len(indices))
        self.fggm_indices[adapter_name].copy_(indices)
        self.fggm_indices.settle(adapter_name)
        self.padded_sizes.pop(adapter_name, None)
        for parameter in self.trained(adapter_name):
            data = parameter.data
            data.zero_() if generator is None else data.copy_(torch.randn(data.shape, generator=generator))
        self.selected[adapter_name] = True
        self.freeze_empty_()

    def freeze_empty_(self) -> None:
        """Freeze values of a support that is empty: they never get a gradient.

        DDP would wait for it, FSDP2 miss its optimizer state when it resumes, and ZeRO-3 fail to fetch it.
        """
        for name, values in self.fggm_values.items():
            if not self.selected[name] or self.fggm_indices[name].numel():
                self._trains_nothing.discard(name)
            elif values.requires_grad:
                self._trains_nothing.add(name)
                for parameter in self.trained(name):
                    parameter.requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.freeze_empty_()

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze_empty_()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let the delta of ``adapter`` count ``scale`` times; an adapter not in this layer is ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def delta(self, adapter_name: str) -> WeightDelta:
        """The sparse delta of one adapter."""
        return WeightDelta(
            self.granularity[adapter_name],
            self.fggm_indices[adapter_name],
            self.fggm_values[adapter_name],
            self.scaling[adapter_name],
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta as a dense tensor, in the shape and orientation of the base layer's weight."""
        delta = self.delta(adapter)
        dense = torch.zeros(self.weight_shape, dtype=delta.values.dtype, device=delta.values.device)
        delta.granularity.add_(dense, delta.indices, delta.values.detach(), delta.scale)
        return self.unmatrix(dense)

    def deltas(self, adapter_names: Sequence[str]) -> list[WeightDelta]:
        """The deltas of those adapters that have one here which is not empty."""
        # the indices are asked, because DeepSpeed's ZeRO-3 fetches a parameter that is touched
        return [self.delta(n) for n in adapter_names if self.selected.get(n) and self.fggm_indices[n].numel()]

    def bias_with_deltas(self, bias: Tensor | None, adapter_names: Sequence[str] | None = None) -> Tensor | None:
        """The base layer's bias with the bias entries of adapters added, the active ones by default; differentiable."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.fggm_bias and self.fggm_indices[name].numel():
                wide = torch.promote_types(bias.dtype, torch.float32)  # added wide and rounded once, as in the merge
                added = (self.fggm_bias[name] * self.scaling[name]).to(wide)
                bias = bias.to(wide).index_add(0, self.fggm_indices[name], added).to(bias.dtype)
        return bias

    def added_bias(self, adapter_names: Sequence[str]) -> Tensor | None:
        """The adapters' bias entries alone, ``[o]``, or None if there are none."""
        base_bias = getattr(self.get_base_layer(), "bias", None)
        if base_bias is None or not any(name in self.fggm_bias for name in adapter_names):
            return None
        return self.bias_with_deltas(torch.zeros_like(base_bias, requires_grad=False), adapter_names)

    # Forward ------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs) -> Tensor:
        if adapter_names is not None and not self.disable_adapters:
            return mixed_batch_forward(self, adapter_names, x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        deltas = self._active_deltas()
        if not deltas and not self.needs_weight_for_gradients(x):
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(deltas, x, *args, **kwargs)

    def _active_deltas(self) -> list[WeightDelta]:
        names = [name for name in self.active_adapters if name in self.fggm_values]
        for name in names:
            if not self.selected[name] and self.training and torch.is_grad_enabled():
                raise AdapterNotSelectedError(
                    f"adapter {name!r} has no support yet, so there is nothing to train. "
                    "Call fggm_peft.select_parameters(model, dataloader) before training."
                )
            if name in self._selected_in_shards:
                raise RuntimeError(
                    f"adapter {name!r} was selected in a model that is sharded already, whose parameters cannot take "
                    "another size. Save it, load it with PeftModel.from_pretrained(..., is_trainable=True), and shard "
                    "that model."
                )
        return self.deltas(names)

    def gives_weight(self) -> bool:
        """Whether the product may be taken with our own copy of the weight, past the base layer.

        Not if the base layer is wrapped by another tuner, hooked, offloaded, trained itself, does
        something of its own in ``forward``, or cannot be dequantized: then only its output is used.
        """
        base = self.base_layer
        if base is not self.get_base_layer():
            return False
        hooks = [hook for name in _HOOKS for hook in getattr(base, name).values()]
        if not all(isinstance(hook, KeptDeltaHook) for hook in hooks):
            return False
        if is_offloaded(base):
            return False
        if self.quantization_backend is not None:
            return self.quantization_backend.supports_merge
        return self.has_plain_forward() and not base.weight.requires_grad

    @property
    def form(self) -> str:
        """How deltas enter the product in training: "effective weight" or "additive" (see ``core.linear``)."""
        return "effective weight" if self.gives_weight() else "additive"

    def needs_weight_for_gradients(self, x: Tensor) -> bool:
        """Whether the base layer's own output would not depend on ``x`` for autograd: it quantizes its inputs."""
        weight = getattr(self.get_base_layer(), "weight", None)
        quantizes_inputs = any(getattr(weight, name, None) is not None for name in _INPUT_QUANTIZATION)
        return quantizes_inputs and x.requires_grad and torch.is_grad_enabled() and self.gives_weight()

    def has_plain_forward(self) -> bool:
        """Whether the base layer computes what its type stands for, and nothing else."""
        return True

    def dense_weight(self) -> Tensor:
        """The weight of a dense base as ``[o, i]``, to be read only."""
        return self.matrix(whole(self.get_base_weight().detach()))

    def weight_copy(self) -> Tensor:
        """The base weight ``[o, i]`` in memory of its own: a copy, or the dequantized weight."""
        if self.quantization_backend is None:
            return self.dense_weight().clone()
        recover_quantization_state(self.get_base_layer())
        weight = self.get_base_weight().detach()
        kept = getattr(self.get_base_layer(), KEPT, None)
        return weight if kept is None else effective_weight(weight, kept.deltas)

    # Merging ------------------------------------------------------------------------------------

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        keep_originals: bool = True,
        quantized_merge: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModuleMerge | None:
        """Merge adapters into the base layer.

        Args:
            safe_merge: raise before anything is changed if the merged weights are not finite.
            adapter_names: which; the active ones by default.
            keep_originals: keep what ``unmerge`` needs to restore the base bit for bit.
            quantized_merge: overrides the adapter's mode.
            dtype: of a layer that ``quantized_merge="dequantize"`` makes dense; default: its compute dtype.

        Returns:
            What became of the delta, or None if there was nothing to merge.

        Raises:
            ValueError: not finite, with ``safe_merge``.
            LossyMergeError: a quantized base would lose part of the delta (``quantized_merge="auto"``).
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.fggm_values]
        if not names:
            return None
        if self.quantization_backend is None:
            report = merge_dense_(self, names, safe_merge, keep_originals)
        else:
            replacement, report = merge_quantized(self, names, safe_merge, quantized_merge, dtype)
            if keep_originals:
                self._replaced_bases.append(self.base_layer)
            self._set_base(replacement)
        self.merged_adapters.extend(names)
        return report

    def unmerge(self) -> None:
        """Take all merged adapters out again: the base layer is what it was, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.fggm_originals:
                self._restore_(base.weight.data, name, self.fggm_originals.pop(name))
            if name in self.fggm_original_bias:
                entries = self.fggm_original_bias.pop(name)
                base.bias.data.index_copy_(0, self.fggm_indices[name].long(), entries.to(base.bias.dtype))
        if self._replaced_bases:
            self._set_base(self._replaced_bases[0])
            self._replaced_bases.clear()

    def _restore_(self, weight: Tensor, name: str, entries: Tensor) -> None:
        matrix = self.matrix(weight)
        self.granularity[name].put_(matrix, self.fggm_indices[name], entries.to(weight.dtype))
        self.write_back_(weight, matrix)

    def write_back_(self, weight: Tensor, matrix: Tensor) -> None:
        """Make sure that what was written to ``matrix`` is in ``weight``, where it was no view of it."""
        if matrix.data_ptr() != weight.data_ptr():
            weight.copy_(self.unmatrix(matrix))

    def _set_base(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(base_layer, **self._quantization_kwargs)

    # Torch and PEFT -----------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        for base in self._replaced_bases:
            base._apply(fn)
        return super()._apply(fn, recurse)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """As PEFT's; the device of an offloaded layer, whose weight is on none, is where it computes.

        PEFT knows no device of a layer whose weight has another name, as HQQ's.
        """
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            device = next((parameter.device for parameter in base_layer.parameters()), None)
        if is_offloaded(base_layer):
            device = execution_device(base_layer)
        return device, dtype

    @property
    def device(self) -> torch.device | None:
        """Where the base layer computes."""
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def get_base_weight(self) -> Tensor:
        """As PEFT's; of an offloaded layer the weight that is kept on the CPU or the disk, to be read only."""
        kept = kept_weight(self.get_base_layer())
        return super().get_base_weight() if kept is None else kept

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter; unlike PEFT's this keeps its dtype: float32 values must not pass through bfloat16."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for container in (self.fggm_values, self.fggm_bias, self.fggm_indices):
            if device is None or adapter_name not in container:
                continue
            tensor = container[adapter_name]
            if tensor.device.type != "meta":
                container[adapter_name] = tensor.to(device)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}={len(self.fggm_indices[name])} {granularity.name}s"
            for name, granularity in self.granularity.items()
        )
        return ", ".join(part for part in (adapters, self.form, quantization_extra_repr(self)) if part)

    def __repr__(self) -> str:
        return "fggm." + super().__repr__()
