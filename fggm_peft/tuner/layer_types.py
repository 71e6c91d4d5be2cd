"""Layer types: how each type of layer stores its weight, computes its output and differentiates the weight.

A new type is one class, registered in ``LAYER_TYPES`` with a predicate of the modules that it wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from ..core.linear import WeightDelta, additive_linear, effective_linear, effective_matrix, is_autocast
from ..core.per_sample import EmbeddingGradients, GroupedGradients, LinearGradients, unfold_convolution
from ..core.registry import Registry
from ..core.tracing import is_recording
from .layer import FGGMLayer

_MIN_POSITIONS_TO_COPY = 32
"""Without gradients, the additive form is faster for fewer positions, as in decoding (measured: benchmarks/suite)."""


@dataclass(frozen=True)
class LayerType:
    """A subclass of ``FGGMLayer``, and a predicate of the modules that it wraps."""

    layer_class: type[FGGMLayer]
    matches: Callable[[nn.Module], bool]


LAYER_TYPES: Registry[LayerType] = Registry("layer type", make=LayerType)
"""Types that were registered later are tried first."""


@LAYER_TYPES.register("torch.nn.Linear", matches=lambda layer: isinstance(layer, nn.Linear))
@LAYER_TYPES.register("transformers' Conv1D", matches=lambda layer: isinstance(layer, Conv1D))
class FGGMLinear(FGGMLayer):
    """``nn.Linear``, transformers' ``Conv1D`` and the linear layers of PEFT's quantization backends."""

    can_decay = True

    @property
    def weight_shape(self):
        return self.out_features, self.in_features

    @property
    def is_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def matrix(self, weight):
        return weight.mT if self.is_transposed else weight

    def unmatrix(self, matrix):
        return matrix.mT if self.is_transposed else matrix

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def has_plain_forward(self):
        return type(self.base_layer).forward in (nn.Linear.forward, Conv1D.forward)

    def adapted_forward(self, deltas: list[WeightDelta], x: Tensor, *args, **kwargs) -> Tensor:
        in_autocast = is_autocast(x)
        dtype = torch.get_autocast_dtype(x.device.type) if in_autocast else self._compute_dtype(x)
        # the additive form consists of plain operators; sizes must not be read while a program is recorded
        positions = x.numel() // max(1, x.shape[-1])
        additive = is_recording() or (not torch.is_grad_enabled() and positions < _MIN_POSITIONS_TO_COPY)
        if dtype is None or additive or args or kwargs or not self.can_copy_weight():
            output = self.base_layer(x, *args, **kwargs)
            return additive_linear(output, x.to(output.dtype), deltas)
        bias = self.base_layer.bias
        bias = None if bias is None else bias.to(dtype)
        output = effective_linear(x.to(dtype), self.weight_copy, bias, deltas, self.weight_version)
        return output if in_autocast else output.to(x.dtype)

    def with_deltas(self, output, adapter_names, x):
        return additive_linear(output, x.to(output.dtype), self.deltas(adapter_names))

    def _compute_dtype(self, x: Tensor) -> torch.dtype | None:
        """The dtype in which the base layer computes without autocast; None if it would reject ``x``."""
        if self.quantization_backend is not None:
            return getattr(self.base_layer, "compute_dtype", None) or x.dtype
        return x.dtype if x.dtype == self.base_layer.weight.dtype else None

    def per_sample(self, calls, gram):
        return LinearGradients(*_concatenated((_tokens(x), _tokens(g)) for x, g in calls), gram)

    def input_features(self, x):
        return _tokens(x)


@LAYER_TYPES.register(
    "torch.nn.Conv1d, Conv2d, Conv3d", matches=lambda layer: isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
)
class FGGMConv(FGGMLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; the weight is ``[o, i * kernel]``."""

    @property
    def weight_shape(self):
        weight = self.get_base_layer().weight
        return weight.shape[0], weight[0].numel()

    def matrix(self, weight):
        return weight.flatten(1)

    def unmatrix(self, matrix):
        return matrix.view(self.get_base_layer().weight.shape)

    def has_plain_forward(self):
        return type(self.base_layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def adapted_forward(self, deltas, x, *args, **kwargs):
        layer = self.get_base_layer()
        if not self.can_copy_weight() or is_recording():
            return super().adapted_forward(deltas, x, *args, **kwargs)
        weight = self.unmatrix(effective_matrix(self.weight_copy, deltas))
        return layer._conv_forward(x, weight, layer.bias)

    def with_deltas(self, output, adapter_names, x):
        layer = self.get_base_layer()
        zeros = torch.zeros(layer.weight.shape, dtype=layer.weight.dtype, device=x.device)
        delta = self.unmatrix(effective_matrix(lambda: self.matrix(zeros), self.deltas(adapter_names)))
        return output + layer._conv_forward(x, delta.to(x.dtype), None)

    def per_sample(self, calls, gram):
        layer = self.get_base_layer()
        patches, g = _concatenated((unfold_convolution(layer, x), g.flatten(2).mT) for x, g in calls)
        if layer.groups == 1:
            return LinearGradients(patches.squeeze(2), g)
        return GroupedGradients(patches, g.unflatten(2, (layer.groups, -1)))

    def input_features(self, x):
        return unfold_convolution(self.get_base_layer(), x).flatten(1, 2)  # each group is a position


@LAYER_TYPES.register("torch.nn.Embedding", matches=lambda layer: isinstance(layer, nn.Embedding))
class FGGMEmbedding(FGGMLayer):
    """``nn.Embedding``: rows are tokens. The forward pass reads only the rows of the batch's tokens."""

    @property
    def weight_shape(self):
        layer = self.get_base_layer()
        return layer.num_embeddings, layer.embedding_dim

    def can_copy_weight(self):
        return False

    def with_deltas(self, output, adapter_names, x):
        embed_scale = self._get_embed_scale()
        wide = torch.promote_types(output.dtype, torch.float32)
        result = output.to(wide)
        for delta in self.deltas(adapter_names):
            rows = delta.granularity.delta_rows(x.reshape(-1), delta.indices, delta.values, self.weight_shape)
            rows = rows.view(*x.shape, -1).to(wide)
            scale = delta.scale if embed_scale is None else delta.scale * embed_scale
            result = result + torch.where(self._is_padding(x), rows.detach(), rows) * scale
        return result.to(output.dtype)

    def per_sample(self, calls, gram):
        tokens, g = _concatenated((x.reshape(len(x), -1), _tokens(g)) for x, g in calls)
        g = g.masked_fill(self._is_padding(tokens), 0)
        embed_scale = self._get_embed_scale()
        return EmbeddingGradients(tokens, g if embed_scale is None else g * embed_scale, self.weight_shape[0])

    def _is_padding(self, tokens: Tensor) -> Tensor:
        """``[..., 1]``: whether a token is ``padding_idx``, whose row gets no gradient in ``nn.Embedding``."""
        padding = self.get_base_layer().padding_idx
        return (tokens == (-1 if padding is None else padding))[..., None]


def _tokens(tensor: Tensor) -> Tensor:
    """``[b, ..., f]`` as ``[b, t, f]``."""
    return tensor[:, None] if tensor.dim() == 2 else tensor.flatten(1, -2)


def _concatenated(calls: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The calls of a layer as one call with the positions of all."""
    inputs, gradients = zip(*calls, strict=True)
    if len(inputs) == 1:
        return inputs[0], gradients[0]
    return torch.cat(inputs, 1), torch.cat(gradients, 1)


def make_layer(base_layer: nn.Module, name: str, **quantization_kwargs) -> FGGMLayer:
    """Wrap a layer, or another tuner's layer around it; ``TypeError`` if its type is not supported.

    ``name`` is its module path, for the error.
    """
    target = base_layer
    while hasattr(target, "base_layer"):
        target = target.base_layer
    backend = resolve_quantization_backend(target, **quantization_kwargs)
    # Transformer Engine's fused layers normalize their input first, so their weight does not multiply it
    if backend is not None and backend.layer_type == "linear" and not hasattr(target, "layer_norm_weight"):
        return FGGMLinear(base_layer, **quantization_kwargs)
    weight = getattr(target, "weight", None)
    # PEFT has no backend for the library that quantized an integer weight, or a tensor of its own class (quanto)
    floating = isinstance(weight, Tensor) and weight.is_floating_point() and not is_traceable_wrapper_subclass(weight)
    # nn.MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear and never calls the layer
    if floating and not isinstance(target, NonDynamicallyQuantizableLinear):
        for description in reversed(list(LAYER_TYPES)):
            if LAYER_TYPES[description].matches(target):
                return LAYER_TYPES[description].layer_class(base_layer, **quantization_kwargs)
    raise TypeError(
        f"{name or 'the targeted module'} is a {type(target).__module__}.{type(target).__qualname__}, which FGGM does "
        f"not support. Supported are {', '.join(LAYER_TYPES)}, and linear layers quantized by bitsandbytes, HQQ, "
        "torchao, GPTQ, AWQ, AQLM, EETQ, INC or Transformer Engine (Linear). Leave it out with `exclude_modules`."
    )
