"""Reads the covariances of the inputs of a model's layers: forward passes only, without labels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.covariance import RANK, Covariance, CovarianceSum
from ..core.errors import NonFiniteScoreError
from ..core.per_sample import same_memory
from ..tuner.files.input_covariance import InputCovariance
from ..tuner.hosts.bitsandbytes import guard_four_bit_layers
from ..tuner.hosts.sharding import without_wrappers
from ..tuner.layer import FGGMLayer
from ..tuner.parameters import ParameterLayer, parameter_layer
from ..tuner.support import unwrapped
from ..tuner.target import outer_modules
from .frozen_model import frozen_in_eval_mode
from .layout import Layout, Layouts
from .processes import Processes
from .rounds import callable_base, rounds
from .weight_inputs import WeightInputs

COVARIANCE_SAMPLES = 64
"""Samples that are read by default."""


def input_covariance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    num_samples: int | None = COVARIANCE_SAMPLES,
    *,
    rank: int = RANK,
    modules: Iterable[str] | None = None,
    progress: bool = True,
) -> InputCovariance:
    """The covariances ``E[x x^T]`` of the inputs of linear layers on data that the model should retain.

    The pass runs forward only and leaves the model unchanged. Padding (``attention_mask`` 0) does not count. Layers
    with the same input, such as q, k and v, share one covariance. If ``torch.distributed`` is initialized, every
    process reads its own share of the data, and all of them get the result for all the data.

    Each expert has the covariance of the tokens that are routed to it; without tokens it is zero and nothing decays.
    Experts cannot share one, because the hidden features of each are its own. With experts, samples are read one at a
    time and without their padding.

    Args:
        model: a model of transformers, with or without adapters; may be wrapped by PEFT.
        dataloader: batches of model inputs; labels are ignored unless the model needs them.
        num_samples: number of samples over all processes; None for all.
        rank: of each covariance. A layer with at most twice as many input features gets the exact covariance.
        modules: module paths in the base model; by default every linear layer except the output head, and every
            expert and router with an adapter. The path of an expert ends with its number.
        progress: show a progress bar on a terminal.

    Returns:
        The normalized covariances.

    Raises:
        NonFiniteScoreError: an input is NaN or infinite; names the module.
        ValueError: there is no data or no linear layer, or a module is missing or is not a linear layer.
    """
    model = without_wrappers(model)
    layers = linear_layers(model) if modules is None else _named_layers(model, list(modules))
    if not layers:
        raise ValueError("the model has no linear layer whose input covariance could be read")
    guard_four_bit_layers(model)
    processes = Processes()
    call = _call(model, layers)
    # what an expert receives has no axis of samples and no mask
    one_by_one = True if any(isinstance(layer, ParameterLayer) for layer in layers.values()) else None
    layouts = Layouts(layers, None if processes.share(model) else call, unwrapped(model), one_by_one)
    with frozen_in_eval_mode(model), torch.no_grad(), _InputHooks(layers, rank) as hooks:
        for round in rounds(model, dataloader, processes, num_samples, "Input covariance", progress):
            with processes.together("reading the input covariance"):
                for part, layout in layouts.parts(round):
                    hooks.open(layout, counts=round.size > 0)
                    assert part.batch is not None
                    call(_without_padding(part.batch) if one_by_one else part.batch)
                hooks.open(None)
    result = hooks.result(processes).normalized()
    if not result.positions:
        warnings.warn("the data contain only padding, so there is nothing to retain", stacklevel=2)
    return result


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers by module path in the base model, adapted or not, without the output head.

    Adapted experts and routers are among them.
    """
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {path: m for path, m in outer_modules(model) if is_linear(m) and head not in (m, _plain(m))}


def input_widths(model: nn.Module) -> dict[str, int]:
    """The number of input features of each of ``linear_layers``."""
    return {path: input_width(layer) for path, layer in linear_layers(model).items()}


def _named_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(outer_modules(model))
    layers = {}
    for path in paths:
        layer = modules.get(path) or parameter_layer(modules, path)
        if layer is None:
            raise ValueError(f"the model has no module {path}")
        if not is_linear(layer):
            raise ValueError(
                f"module {path} is a {type(_plain(layer)).__name__}. Input covariances and harm decay support linear "
                "layers, experts and adapted routers; leave the module out with exclude_modules, or set harm_decay=0"
            )
        layers[path] = layer
    return layers


def _call(model: nn.Module, layers: Mapping[str, nn.Module]):
    """Runs the model forward on a batch, without its head if all layers are in the trunk."""
    base, caller = unwrapped(model), callable_base(model)
    trunk = getattr(base, "base_model", base)
    inside = set(map(id, trunk.modules()))
    if trunk is base or caller is not base or not all(id(layer) in inside for layer in layers.values()):
        return lambda batch: caller(**batch)
    return lambda batch: trunk(**{name: value for name, value in batch.items() if name != "labels"})


def _without_padding(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tokens of one sample that are no padding; all of them if there is no other."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not mask.any():
        return batch
    is_real = mask[0] != 0
    return {
        name: value[:, is_real] if isinstance(value, Tensor) and value.shape[1:2] == is_real.shape else value
        for name, value in batch.items()
    }


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    """Whether a layer, adapted or not, is linear, an expert or a router."""
    return module.can_decay if isinstance(module, FGGMLayer) else isinstance(_plain(module), (nn.Linear, Conv1D))


def input_width(layer: nn.Module) -> int:
    """The number of input features of a linear layer, adapted or not."""
    if isinstance(layer, FGGMLayer):
        return layer.weight_shape[1]
    plain: Any = _plain(layer)
    return plain.weight.shape[0] if isinstance(plain, Conv1D) else plain.in_features


class _InputHooks:
    """Hooks that add each layer's input to a sum, once for layers with the same input."""

    def __init__(self, layers: Mapping[str, nn.Module], rank: int):
        self.layers, self.rank = layers, rank
        self.sums: dict[str, CovarianceSum] = {}
        self.inputs: dict[str, str] = {}
        self._layout: Layout | None = None
        self._counts = True
        self._last: tuple[Tensor, int | None, str] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> _InputHooks:
        modules: dict[nn.Module, WeightInputs] = {}
        for path, layer in self.layers.items():
            if isinstance(layer, ParameterLayer):
                module = layer.source[0]
                modules.setdefault(module, WeightInputs(module, self._record)).add(path, layer)
            else:
                self._handles.append(layer.register_forward_hook(partial(self._record_call, path), with_kwargs=True))
        for inputs in modules.values():
            self._handles += inputs.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def open(self, layout: Layout | None, counts: bool = False) -> None:
        """Start a batch; it is not added unless ``counts``. Without a layout, calls are ignored."""
        self._layout, self._counts, self._last = layout, counts, None

    def _record_call(self, path: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        self._record(path, (args[0] if args else next(iter(kwargs.values()))).detach())

    def _record(self, path: str, x: Tensor) -> None:
        if self._layout is None:
            return
        version = None if x.is_inference() else x._version  # the model may have written into the last input
        last = self._last
        if last is not None and same_memory(last[0], x) and last[1] == version:
            key = last[2]
        else:
            key = self.inputs.get(path, path)
            self._last = x, version, key
            if self._counts:
                self._add(key, path, x)
        self.inputs.setdefault(path, key)

    def _add(self, key: str, path: str, x: Tensor) -> None:
        if key not in self.sums:
            self.sums[key] = CovarianceSum(x.shape[-1], self.rank, x.device)
        assert self._layout is not None
        x = self._layout.positions(path, x)
        with torch.autocast(x.device.type, enabled=False):
            self.sums[key].add_(x)

    def result(self, processes: Processes) -> InputCovariance:
        """The mean over all positions and processes; zero for layers that were not called."""
        for others in processes.gather(self.inputs):  # an expert may have been called on some processes only
            self.inputs = {**others, **self.inputs}
        covariances, positions = {}, 0
        device = next((entry.product.device for entry in self.sums.values()), torch.device("cpu"))
        for path in self.layers:
            key = self.inputs.setdefault(path, path)
            if key not in covariances:
                covariances[key], count = self._covariance(key, processes, device)
                positions = max(positions, count)
        return InputCovariance(covariances, self.inputs, self.rank, positions)

    def _covariance(self, key: str, processes: Processes, device: torch.device) -> tuple[Covariance, int]:
        entry = self.sums.pop(key, None) or CovarianceSum(input_width(self.layers[key]), self.rank, device)
        entry.product, entry.energy = processes.sum(entry.product), processes.sum(entry.energy)
        entry.positions = sum(processes.gather(entry.positions))
        if not torch.isfinite(entry.product).all():
            raise NonFiniteScoreError(
                f"the inputs of module {key} are NaN or infinite on the data to retain. Check the data; a float16 "
                "model may need bfloat16 or float32"
            )
        return entry.covariance(), entry.positions
