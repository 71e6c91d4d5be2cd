"""Weights that a module uses without a layer of their own: experts, routers and ``nn.MultiheadAttention``.

The module's own forward is called with adapted weights in place of its parameters, by ``functional_call``. So every
implementation of it is supported, and the result is that of the merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.linear import effective_matrix
from ..core.per_sample import MatrixGradients
from ..core.rebuilt import rebuilt_in_backward
from ..core.weight_delta import WeightDelta
from .hosts.offloading import is_offloaded
from .layer import FGGMLayer
from .layer_types import LAYER_TYPES, make_layer

_STORE_INPUTS_FIRST = ("Llama4TextExperts",)
"""Experts that store ``[experts, in, out]`` and have no attribute ``is_transposed``."""


class ParameterLayer(FGGMLayer):
    """A weight that its module reads by itself, so that neither inputs nor outputs of a product are visible."""

    reads_inputs = False

    @property
    def source(self) -> tuple[nn.Module, str, int | None]:
        """The module, the name of its parameter, and the number of the expert in it."""
        return self.get_base_layer(), "weight", None

    @property
    def can_decay(self):
        return not isinstance(self.source[0], nn.MultiheadAttention)

    @property
    def weight_shape(self):
        o, i = self.matrix(self.get_base_layer().weight).shape
        return o, i

    def _features(self):
        return self.weight_shape[1], self.weight_shape[0]

    def can_copy_weight(self):
        return True

    def with_deltas(self, output, adapter_names, x):
        raise TypeError(f"a {type(self).__name__} is not called with the input of its weight")

    def per_sample(self, calls, gram):
        return MatrixGradients(sum(gradient for _, gradient in calls))


@LAYER_TYPES.register("routers of experts", matches=lambda module: type(module).__name__.endswith(("Router", "Gate")))
class FGGMWeight(ParameterLayer):
    """Any module with a matrix ``weight``, such as the router of a mixture of experts."""

    def forward(self, *args, **kwargs):
        return call_adapted(self.base_layer, {"weight": [self]}, args, kwargs)


class _Matrix:
    """One matrix of a module's parameter, as the base layer of an ``FGGMParameter``. It does not own the module."""

    def __init__(self, module: nn.Module, name: str, index: int | None):
        self.module, self.name, self.index = module, name, index

    @property
    def weight(self) -> Tensor:
        parameter = self.module.get_parameter(self.name)
        return parameter if self.index is None else parameter[self.index]


class FGGMParameter(ParameterLayer):
    """A parameter ``[o, i]`` of a module, or one expert's matrix of ``[experts, o, i]``. It is not called."""

    def __init__(self, module: nn.Module, name: str, index: int | None = None):
        default = type(module).__name__ in _STORE_INPUTS_FIRST
        self.is_transposed = index is not None and getattr(module, "is_transposed", default)
        super().__init__(_Matrix(module, name, index))  # type: ignore[arg-type]
        self.is_expert = index is not None

    def get_base_layer(self):
        return self.base_layer

    @property
    def source(self):
        return self.base_layer.module, self.base_layer.name, self.base_layer.index

    def matrix(self, weight):
        return weight.mT if self.is_transposed else weight

    unmatrix = matrix

    def part(self, parameter):
        return self.matrix(parameter if self.base_layer.index is None else parameter[self.base_layer.index])


class FGGMParameters(nn.Module):
    """A module whose parameters are adapted. Each parameter is a child: one ``FGGMParameter``, or a list for experts.

    Other attributes are those of the module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.base_layer = module
        self.adapted: dict[str, str] = {}  # child -> name of the parameter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # while the module is copied or unpickled
                raise
        # if it were True, nn.TransformerEncoderLayer would read the weights without calling the module
        if name == "_qkv_same_embed_dim":
            return False
        return getattr(self.base_layer, name)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def layers(self, child: str) -> list[FGGMParameter]:
        """The matrices of one parameter, which is added if it is not adapted yet."""
        if child not in self.adapted:
            name = parameter_names(self.base_layer)[child]
            experts = self.base_layer.get_parameter(name).shape[:-2]
            layers = [FGGMParameter(self.base_layer, name, e) for e in range(experts[0])] if experts else []
            # add_module would find the parameter of the same name
            self._modules[child] = nn.ModuleList(layers) if experts else FGGMParameter(self.base_layer, name)
            self.adapted[child] = name
        module: Any = self._modules[child]
        return list(module) if isinstance(module, nn.ModuleList) else [module]

    def forward(self, *args, **kwargs):
        layers = {name: self.layers(child) for child, name in self.adapted.items()}
        return call_adapted(self.base_layer, layers, args, kwargs)


def parameter_names(module: nn.Module) -> dict[str, str]:
    """The names of a module's parameters in module paths -> their names in the module."""
    if isinstance(module, nn.MultiheadAttention):
        names = [name for name, _ in module.named_parameters() if name.endswith("weight")]
        return {name.replace(".", "_").removesuffix("_weight"): name for name in names}
    return {name: name for name, _ in module.named_parameters(recurse=False)}


def targeted_layers(
    model: nn.Module, target: nn.Module, path: str, parameter: str | None, **quantization: Any
) -> dict[str, FGGMLayer]:
    """Module path -> layer of everything that a targeted module, or one parameter of it, consists of.

    Puts an ``FGGMParameters`` around a module whose parameters are adapted, but no other layer into the model. Raises
    ``TypeError`` or ``ValueError`` for what is not supported.
    """
    base, parent = getattr(target, "base_layer", target), path.rpartition(".")[0]
    if isinstance(target, FGGMLayer):
        return {path: target}
    if parameter is None and isinstance(base, nn.MultiheadAttention):
        parts = [_adapt_parameter_(model, path, name) for name in parameter_names(base).values()]
        return {where: layer for part in parts for where, layer in part.items()}
    if parameter is None and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return _adapt_parameter_(model, parent, f"{path.rpartition('.')[2]}.weight")
    if parameter not in (None, "weight"):
        return _adapt_parameter_(model, path, parameter)
    try:
        layer = make_layer(target, path, **quantization)
    except TypeError:
        if parameter is None:
            raise
        if base.weight.dim() != 2 or not base.weight.is_floating_point():
            return _adapt_parameter_(model, path, parameter)
        layer = FGGMWeight(base)
    if isinstance(layer, FGGMWeight):
        _require_on_device(base, path)
    return {path: layer}


def _adapt_parameter_(model: nn.Module, path: str, name: str) -> dict[str, FGGMLayer]:
    """Module path -> layer of each matrix of one parameter."""
    path = path.removesuffix(".base_layer")
    module = model.get_submodule(path)
    base = module.base_layer if isinstance(module, FGGMParameters) else module
    parameter, child = base.get_parameter(name), {n: c for c, n in parameter_names(base).items()}[name]
    where = f"{path}.{child}"
    if parameter.dim() not in (2, 3):
        raise ValueError(f"{where} is a parameter with {parameter.dim()} dimensions, but only 2d and 3d are supported.")
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise ValueError(f"{where} is quantized ({parameter.dtype}), which FGGM does not support. Load it unquantized.")
    _require_on_device(base, where)
    for key, other in model.named_parameters(remove_duplicate=False):
        is_own = key.endswith(f".{name}") and model.get_submodule(key[: -len(name) - 1]) is base
        if other is parameter and not is_own:
            raise ValueError(
                f"{where} shares its tensor with {key}, so that merging would change both. Give each a tensor of its "
                "own, or leave it out."
            )
    if module is base:
        module = FGGMParameters(base)
        replace_everywhere_(model, base, module)
    layers = module.layers(child)
    return {f"{where}.{e}" if parameter.dim() == 3 else where: layer for e, layer in enumerate(layers)}


def _require_on_device(module: nn.Module, where: str) -> None:
    if is_offloaded(module):
        raise ValueError(f"{where} is offloaded, which FGGM does not support for parameters. Give it a device.")


def replace_everywhere_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module that a model may contain several times."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old and parent is not new:
                parent._modules[name] = new


def matched_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Module path, name and key of each parameter that ``target_parameters`` names, as in PEFT.

    The names in module paths, such as ``in_proj``, are accepted too.
    """
    endings = tuple(f".{name}" for name in names)
    for path, module in list(model.named_modules()):
        base = getattr(module, "base_layer", module)
        if "base_layer" in path.split(".") or not isinstance(base, nn.Module):
            continue
        for child, name in parameter_names(base).items():
            if f".{path}.{name}".endswith(endings) or f".{path}.{child}".endswith(endings):
                if not path:
                    raise ValueError(f"{name} is a parameter of the model itself, which cannot be adapted.")
                yield path, name, f"{path}.{name}"


def parameter_layer(modules: Mapping[str, nn.Module], path: str) -> FGGMLayer | None:
    """The layer of a path such as ``mlp.experts.down_proj.3`` in a model without adapters; None for other paths."""
    parent, _, child = path.rpartition(".")
    index = int(child) if child.isdecimal() else None
    if index is not None:
        parent, _, child = parent.rpartition(".")
    module = modules.get(parent)
    if module is None or child not in (names := parameter_names(module)):
        return None
    shape = module.get_parameter(names[child]).shape
    fits = len(shape) == 2 if index is None else len(shape) == 3 and index < shape[0]
    return FGGMParameter(module, names[child], index) if fits else None


def stacked_layers(module: nn.Module, path: str) -> dict[str, FGGMLayer]:
    """Module path -> layer of each expert in the parameters of a module without adapters."""
    return {
        f"{path}.{name}.{expert}": FGGMParameter(module, name, expert)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        for expert in range(len(parameter))
    }


def call_adapted(module: nn.Module, layers: Mapping[str, Sequence[ParameterLayer]], args: tuple, kwargs: dict) -> Any:
    """Call a module with the layers of each parameter's matrices. The adapted copies are not kept for backward."""
    changes = {
        name: [(d, layer.part) for layer in group for d in layer.current_deltas()] for name, group in layers.items()
    }

    def adapted(name: str) -> Tensor:
        return _adapted(module.get_parameter(name), changes[name])

    weights = {name: adapted(name) for name, pairs in changes.items() if pairs}
    copied = [name for name in weights if not module.get_parameter(name).requires_grad]
    copies = [weights[name] for name in copied]
    for name, group in layers.items():
        calls = [(layer.part, layer.observer()) for layer in group if layer.observer is not None]
        if finishes := [(part, finish) for part, finish in calls if finish is not None]:
            weight = weights.get(name, module.get_parameter(name))
            weights[name] = _Observed.apply(weight, weight.new_zeros((), requires_grad=True), finishes)
    values = [delta.values for pairs in changes.values() for delta, _ in pairs]
    with rebuilt_in_backward(copies, lambda n: adapted(copied[n]), values) if copies else nullcontext():
        return functional_call(module, weights, args, kwargs) if weights else module(*args, **kwargs)


def _adapted(parameter: Tensor, pairs: Sequence[tuple[WeightDelta, Callable[[Tensor], Tensor]]]) -> Tensor:
    """A copy of the parameter with deltas, each on its part."""
    deltas, parts = zip(*pairs, strict=True)
    if parameter.requires_grad:  # it trains as well
        return parameter + effective_matrix(lambda: torch.zeros_like(parameter), deltas, parts)
    return effective_matrix(lambda: parameter.detach().clone(), deltas, parts)


class _Observed(torch.autograd.Function):
    """The identity; its backward passes the gradient of each part to its observer."""

    @staticmethod
    def forward(ctx, weight, anchor, finishes):
        ctx.finishes = finishes
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, g):
        for part, finish in ctx.finishes:
            finish(part(g))
        return None, None, None
