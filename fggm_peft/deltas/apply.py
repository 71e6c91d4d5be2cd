"""Adds deltas to a base model permanently."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.ranking import all_finite
from ..tuner.files.base_check import base_difference
from ..tuner.files.reading import adapted_layers
from ..tuner.files.tensors import BASE_PART, PREFIX, is_trained_whole
from ..tuner.hosts.bitsandbytes import guard_four_bit_layers
from ..tuner.layer import FGGMLayer
from ..tuner.merging.merge import MergeReport, ModuleMerge, add_to_dense_, record_of, total, unchanged
from ..tuner.merging.sidecar import with_sidecar
from .base_model import names_of_tensors
from .delta import ModuleDelta, SparseDelta

logger = logging.getLogger(__name__)


def apply_deltas(model: nn.Module, sources: Sequence[Any]) -> MergeReport:
    """Add deltas to a base model in place, one after another.

    Each entry is added in float32 and rounded once for each delta, as in ``merge_adapter``. A quantized layer does not
    change; it gets the deltas as a sidecar (``quantized_merge="keep"``). Everything is checked before anything changes.
    A warning says if the first delta was trained on other weights, which is intended if earlier deltas are left out.

    Args:
        model: the base, without adapters.
        sources: what ``SparseDelta.read`` accepts, in order.

    Returns:
        The outcome for each module.

    Raises:
        ValueError: a weight has another shape in a delta, or a value of a delta is not finite.
        TypeError: the model has adapters.
    """
    deltas = [SparseDelta.read(source) for source in sources]
    layers = layers_to_change(model, deltas)
    _warn_of_tied_weights(model, layers)
    _warn_of_another_base(layers, deltas)
    replacements = [(_replaced_parameters(model, delta), delta.others) for delta in deltas]
    guard_four_bit_layers(model)  # the base must stay one that can be dequantized
    records = []
    for path, layer in tqdm(layers.items(), "Merging", disable=None):
        module_deltas = [delta.modules[path] for delta in deltas if path in delta.modules]
        records.append(replace(_add_to_layer_(model, path, layer, module_deltas), name=path))
    for parameters, tensors in replacements:
        for key, parameter in parameters.items():
            parameter.detach().copy_(tensors[key])
    report = MergeReport(records)
    logger.info("%s", report)
    return report


def _warn_of_tied_weights(model: nn.Module, paths: Collection[str]) -> None:
    for names in names_of_tensors(model).values():
        sharing = [name.rpartition(".")[0] for name in names]
        if len(sharing) > 1 and (changed := [path for path in sharing if path in paths]):
            others = ", ".join(path for path in sharing if path != changed[0])
            warnings.warn(
                f"{changed[0]} shares its weight with {others}. The merge changes both; an adapter that is not merged "
                f"changes only {' and '.join(changed)}",
                stacklevel=3,
            )


def _warn_of_another_base(layers: Mapping[str, FGGMLayer], deltas: Sequence[SparseDelta]) -> None:
    expected = deltas[0].config.base_fingerprint or {} if deltas else {}
    if problem := base_difference(layers, expected):
        warnings.warn(
            f"the first delta was trained on another base, or on top of deltas that are not merged here: {problem}",
            stacklevel=3,
        )


def require_finite(path: str, module: ModuleDelta) -> None:
    """Raise ``ValueError`` if a value of a delta is NaN or infinite."""
    if not all_finite(module.values):
        raise ValueError(f"the delta of {path} has a value that is NaN or infinite")


def layers_to_change(model: nn.Module, deltas: Sequence[SparseDelta]) -> dict[str, FGGMLayer]:
    """The layers of a base that the deltas change, after all checks of ``apply_deltas``. The model stays as it is."""
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError("the model has adapters: pass the base model itself (model.unload() returns it)")
    layers: dict[str, FGGMLayer] = {}
    for delta in deltas:
        layers |= adapted_layers(model, {path: module.shape for path, module in delta.modules.items()})
        for path, module in delta.modules.items():
            require_finite(path, module)
    return layers


def _add_to_layer_(model: nn.Module, path: str, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> ModuleMerge:
    """Add deltas to the weight of one layer, or to its sidecar if it is quantized."""
    added = [delta.to(layer.device) for delta in deltas]
    if layer.quantization_backend is not None:
        model.set_submodule(path, with_sidecar(layer.get_base_layer(), added))
        return unchanged(added)
    weight = layer.get_base_layer().weight.detach()
    matrix = layer.matrix(weight)
    record = total([record_of(delta, *add_to_dense_(matrix, delta)) for delta in added])
    layer.write_back_(weight, matrix)
    return record


def _replaced_parameters(model: nn.Module, delta: SparseDelta) -> Mapping[str, Tensor]:
    """Key of a whole tensor in the delta's file -> the parameter of the model that it replaces."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    parameters = {}
    for key, tensor in delta.others.items():
        name = key.removeprefix(PREFIX).replace(BASE_PART, ".")
        if name not in state or state[name].shape != tensor.shape:
            raise ValueError(f"{key}: the model has no {name} of shape {list(tensor.shape)}")
        if is_trained_whole(key):
            parameters[key] = state[name]
    return parameters
