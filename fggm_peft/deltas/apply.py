"""Adds deltas to a base model for good, and writes the result as a checkpoint that needs no PEFT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.finite import all_finite
from ..tuner.files.atomic import complete_folder, write_json
from ..tuner.files.reading import module_paths
from ..tuner.files.tensors import BASE_PART, PREFIX
from ..tuner.hosts.bitsandbytes import guard_four_bit_layers
from ..tuner.layer import FGGMLayer
from ..tuner.merging.merge import add_to_dense_
from ..tuner.merging.report import MergeReport, ModuleMerge, total
from ..tuner.merging.sidecar import keep_beside
from .delta import ModuleDelta, SparseDelta, moved_to
from .meta_base import layer_of

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"


def apply_deltas(model: nn.Module, sources: Sequence[Any], progress: bool = False) -> MergeReport:
    """Add deltas to a base model in place, one after another.

    Each entry is added in float32 and rounded once for each delta, as ``merge_adapter`` does. A quantized layer stays
    as it is and gets the deltas beside it (``quantized_merge="keep"``). Everything is checked before anything changes.

    Args:
        model: the base, without adapters.
        sources: what ``SparseDelta.read`` takes, in order.
        progress: show a bar.

    Returns:
        What became of each module's delta.

    Raises:
        ValueError: a delta was made for another base, or its values are not finite.
        TypeError: the model has adapters.
    """
    deltas = [SparseDelta.read(source, base=model) for source in sources]
    layers = plain_layers(model, deltas)
    whole = [_whole_parameters(model, delta) for delta in deltas]
    guard_four_bit_layers(model)  # as for an adapter: the base must stay one that can be dequantized
    records = []
    for name, layer in tqdm(layers.items(), "Merging", disable=not progress):
        held = [delta.modules[name] for delta in deltas if name in delta.modules]
        records.append(replace(add_module_(model, name, layer, held), name=name))
    for parameters, delta in zip(whole, deltas, strict=True):
        for name, parameter in parameters.items():
            parameter.data.copy_(delta.others[name])
    report = MergeReport(records)
    logger.info("%s", report)
    return report


def export_merged(
    model: Any, sources: Sequence[Any], output: str | Path, tokenizer: Any = None, progress: bool = False
) -> MergeReport:
    """Merge deltas into a dense base model, in place, and save it as any other, with the report beside it.

    Args:
        model: the base, of transformers, unquantized.
        sources: what ``SparseDelta.read`` takes, in order.
        output: the folder; what is in it under other names stays.
        tokenizer: saved too, if given.

    Returns:
        The report that is in the folder as ``merge_report.json``.

    Raises:
        ValueError: as ``apply_deltas``; and the base is quantized, so that deltas could not be in its weights.
    """
    require_dense(model)
    report = apply_deltas(model, sources, progress)
    save_merged(model, output, report, tokenizer)
    return report


def require_dense(model: Any) -> None:
    """Raise ``ValueError`` for a quantized base, which a delta can not be merged into without a loss."""
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the base is quantized, and a merged checkpoint of it would lose part of the deltas. Load the base "
            "unquantized, or merge with quantized_merge='requantize' by merge_and_unload()"
        )


def save_merged(model: Any, output: str | Path, report: MergeReport, tokenizer: Any = None) -> None:
    """Write a merged model with its report, whole or not at all."""
    with complete_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / REPORT, report.to_dict())


def plain_layers(model: nn.Module, deltas: Sequence[SparseDelta]) -> dict[str, FGGMLayer]:
    """The layers of a base that deltas are about to change, wrapped for the time being; checked against the deltas.

    Raises:
        ValueError: a module is missing or has another shape, or a value is not finite.
        TypeError: the model has adapters.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise TypeError("the model has adapters: pass the base model itself (model.unload() gives it)")
    modules = module_paths(model)
    quantization = get_quantization_kwargs(model)
    layers: dict[str, FGGMLayer] = {}
    for delta in deltas:
        for name, module in delta.modules.items():
            if name not in layers:
                layers[name] = layer_of(modules.get(name), name, **quantization)
            _require_fit(name, layers[name], module)
    return layers


def _require_fit(name: str, layer: FGGMLayer, module: ModuleDelta) -> None:
    if layer.weight_shape != module.shape:
        raise ValueError(
            f"the delta was made for another base: {name} is {list(layer.weight_shape)} here, {list(module.shape)} in "
            "the delta"
        )
    if not all(all_finite(tensor) for part, tensor in module.tensors.items() if part != "indices"):
        raise ValueError(f"the delta of {name} has a value that is NaN or infinite")
    if module.bias is not None and getattr(layer.get_base_layer(), "bias", None) is None:
        raise ValueError(f"the delta changes the bias of {name}, which has none here")


def add_module_(model: nn.Module, name: str, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> ModuleMerge:
    """Add deltas to one layer of the model: into its weight, or beside it if it is quantized."""
    deltas = [moved_to(delta, layer.device) for delta in deltas]
    if layer.quantization_backend is not None:
        record = _keep_(model, name, layer, deltas)
    else:
        record = change_weight_(
            layer, lambda matrix: total([add_to_dense_(matrix, delta.scaled(), False)[0] for delta in deltas])
        )
    bias = getattr(layer.get_base_layer(), "bias", None)
    for delta in deltas:
        if delta.bias is not None:
            add_bias_(bias.data, delta)
    return record


def add_bias_(bias: Tensor, delta: ModuleDelta, sign: float = 1.0) -> None:
    """Add the bias entries of a delta on the same device to a bias ``[o]`` in place, in float32, rounded once."""
    assert delta.bias is not None
    rows = delta.indices.long()
    bias.index_copy_(0, rows, (bias[rows].float() + sign * delta.bias.float()).to(bias.dtype))


def change_weight_(layer: FGGMLayer, change: Callable[[Tensor], Any]) -> Any:
    """Let ``change`` work on the dense weight ``[o, i]`` in place, however the layer stores it; returns its result."""
    weight = layer.get_base_layer().weight.data
    matrix = layer.matrix(weight)
    result = change(matrix)
    layer.write_back_(weight, matrix)
    return result


def _keep_(model: nn.Module, name: str, layer: FGGMLayer, deltas: Sequence[ModuleDelta]) -> ModuleMerge:
    set_module(model, name, keep_beside(layer.get_base_layer(), [delta.scaled() for delta in deltas]))
    square = sum(float(delta.values.double().square().sum()) for delta in deltas)
    return ModuleMerge(square**0.5, square, 0.0, "kept")


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where the one of this path is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _whole_parameters(model: nn.Module, delta: SparseDelta) -> Mapping[str, Tensor]:
    """Names of the whole tensors in the delta's file -> what they replace in the model.

    Raises:
        ValueError: the model has none of the name, or of another shape.
    """
    there: dict[str, Tensor] = model.state_dict(keep_vars=True)
    found = {}
    for key, tensor in delta.others.items():
        name = key.removeprefix(PREFIX).replace(BASE_PART, ".")
        if name not in there or there[name].shape != tensor.shape:
            raise ValueError(f"{key}: the model has no {name} of the shape {list(tensor.shape)}")
        if BASE_PART not in key:
            found[key] = there[name]
    return found
