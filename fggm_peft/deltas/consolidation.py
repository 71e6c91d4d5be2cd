"""Folds finished deltas on a quantized base into one frozen sidecar, on which the next task starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn

from ..tuner.hosts.sharding import path_in_base
from ..tuner.layer import FGGMLayer
from ..tuner.merging.report import MergeReport

logger = logging.getLogger(__name__)


def consolidate(model: Any, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Fold the deltas of a model's adapters into its base, of which the quantized layers stay as they are.

    As ``merge_and_unload`` with ``quantized_merge="keep"``, whatever the adapters' configs say: beside each quantized
    layer there is one frozen delta for each granularity, on the union of all supports that were ever folded into it.
    So memory grows with the union and not with the number of tasks, and nothing is lost to quantization. Layers that
    are not quantized take the deltas into their weights.

    Args:
        model: a ``PeftModel`` with FGGM adapters on a quantized base. It is used up.
        adapter_names: which adapters, in order; all by default. Others are dropped.

    Returns:
        The base model, on which ``get_peft_model`` puts the adapter of the next task.

    Raises:
        TypeError: it is no ``PeftModel``, or no layer of its base is quantized: then ``merge_and_unload`` is exact.
        ValueError: an adapter is unknown, is no FGGM adapter or is merged already, or its values are not finite.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"consolidate takes a PeftModel with FGGM adapters, not a {type(model).__name__}")
    names = list(model.peft_config) if adapter_names is None else list(adapter_names)
    layers = {path_in_base(name): m for name, m in model.named_modules() if isinstance(m, FGGMLayer)}
    _require_foldable(model, names, layers)
    records = []
    for name, layer in layers.items():
        record = layer.merge(True, names, keep_originals=False, quantized_merge="keep")
        if record is not None:
            records.append(replace(record, name=name))
    logger.info("%s", MergeReport(records))
    return model.unload()


def _require_foldable(model: PeftModel, names: Sequence[str], layers: dict[str, FGGMLayer]) -> None:
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        raise ValueError(f"there is no adapter {unknown or names} on this model; it has {', '.join(model.peft_config)}")
    others = [name for name in names if model.peft_config[name].peft_type != "FGGM"]
    if others:
        raise ValueError(f"{', '.join(others)} are no FGGM adapters and have no sparse delta")
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(f"{', '.join(layer.merged_adapters)} are merged ({path}); call unmerge_adapter() first")
        for name in names:
            if name in layer.fggm_values and not all(bool(t.isfinite().all()) for t in layer.trained(name)):
                raise ValueError(f"the adapter {name!r} has a value that is NaN or infinite ({path})")
    if not any(layer.quantization_backend is not None for layer in layers.values()):
        raise TypeError("no layer of the base is quantized: merge_and_unload() puts the deltas into its weights")
