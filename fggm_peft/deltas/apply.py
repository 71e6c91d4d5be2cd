"""Adds deltas to a base model permanently, and writes the result as a checkpoint that does not need PEFT."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.ranking import all_finite
from ..tuner.files.atomic import complete_folder, write_json
from ..tuner.files.reading import adapted_layers
from ..tuner.files.tensors import BASE_PART, PREFIX, is_trained_whole
from ..tuner.hosts.bitsandbytes import guard_four_bit_layers
from ..tuner.layer import FGGMLayer
from ..tuner.merging.merge import add_to_dense_
from ..tuner.merging.report import MergeReport, ModuleMerge, total
from ..tuner.merging.sidecar import with_sidecar
from .delta import ModuleDelta, SparseDelta

if TYPE_CHECKING:
    from .ledger import Ledger

logger = logging.getLogger(__name__)

REPORT = "merge_report.json"


def apply_deltas(model: nn.Module, sources: Sequence[Any], progress: bool = False) -> MergeReport:
    """Add deltas to a base model in place, one after another.

    Each entry is added in float32 and rounded once for each delta, as in ``merge_adapter``. A quantized layer does not
    change; it gets the deltas as a sidecar (``quantized_merge="keep"``). Everything is checked before anything changes.

    Args:
        model: the base, without adapters.
        sources: what ``SparseDelta.read`` accepts, in order.
        progress: show a progress bar.

    Returns:
        The outcome for each module.

    Raises:
        ValueError: a delta was made for another base, or its values are not finite.
        TypeError: the model has adapters.
    """
    deltas = [SparseDelta.read(source) for source in sources]
    layers = layers_to_change(model, deltas)
    replacements = [(_replaced_parameters(model, delta), delta.others) for delta in deltas]
    guard_four_bit_layers(model)  # the base must stay one that can be dequantized
    records = []
    for path, layer in tqdm(layers.items(), "Merging", disable=None if progress else True):
        module_deltas = [delta.modules[path] for delta in deltas if path in delta.modules]
        records.append(replace(_add_to_layer_(model, path, layer, module_deltas), name=path))
    for parameters, tensors in replacements:
        for key, parameter in parameters.items():
            parameter.detach().copy_(tensors[key])
    report = MergeReport(records)
    logger.info("%s", report)
    return report


def export_merged(
    model: Any, sources: Sequence[Any] | Ledger, output: str | Path, tokenizer: Any = None, progress: bool = False
) -> MergeReport:
    """Merge deltas into a dense base, and save it with a report (``merge_report.json``) and the tokenizer.

    The model is moved into the folder when it is complete.

    Args:
        sources: deltas, as in ``apply_deltas``, or a ``Ledger``, whose tasks are merged.

    Raises:
        ValueError: as ``apply_deltas``, or the base is quantized, so that the deltas could not be in its weights.
    """
    require_dense(model)
    if isinstance(sources, Sequence):
        report = apply_deltas(model, sources, progress)
    else:
        report = sources.apply(model, progress=progress)
    with complete_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / REPORT, report.to_dict())
    return report


def require_dense(model: Any) -> None:
    """Raise ``ValueError`` if a model is quantized, so that its weights cannot hold the deltas exactly."""
    if getattr(model, "is_quantized", False):
        raise ValueError(
            "the base is quantized, and a merged checkpoint of it would lose part of the deltas. Load the base "
            "unquantized, or use merge_and_unload() with quantized_merge='requantize'"
        )


def require_finite(path: str, module: ModuleDelta) -> None:
    """Raise ``ValueError`` if a value of a delta is NaN or infinite."""
    if not all(all_finite(tensor) for part, tensor in module.tensors.items() if part != "indices"):
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
    added = [delta.to(layer.device).weight_delta() for delta in deltas]
    if layer.quantization_backend is not None:
        replace_module(model, path, with_sidecar(layer.get_base_layer(), added))
        square = sum(float(delta.values.double().square().sum()) for delta in added)
        return ModuleMerge(square**0.5, square, 0.0, "kept")
    weight = layer.get_base_layer().weight.detach()
    matrix = layer.matrix(weight)
    record = total([add_to_dense_(matrix, delta, False)[0] for delta in added])
    layer.write_back_(weight, matrix)
    return record


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module at a path."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
