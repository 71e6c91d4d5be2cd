"""Batches whose samples use different adapters, or none: ``model(..., adapter_names=[...])`` as in PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..layer import FGGMLayer

BASE = "__base__"
"""PEFT's name for no adapter."""


@contextmanager
def adapter_of_each_sample(model: nn.Module, layer_class: type, names: Any, num_beams: Any) -> Iterator[None]:
    """Pass the adapter names, one for each sample, to the adapted layers and to modules that are trained as a whole.

    With ``num_beams`` of ``generate``, the decoder sees each sample that many times, the encoder once.
    """
    if names is None:
        yield
        return
    _require_legal(model, layer_class, names)
    beams = num_beams if isinstance(num_beams, int) else 1
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    # a model without an encoder returns itself
    in_encoder = set() if encoder is None or encoder is model.model else set(encoder.modules())
    handles = []
    for module in model.modules():
        if isinstance(module, (layer_class, AuxiliaryTrainingWrapper)):
            repeated = list(names) if module in in_encoder else [name for name in names for _ in range(beams)]
            handles.append(module.register_forward_pre_hook(partial(_add_names, names=repeated), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_legal(model: nn.Module, layer_class: type, names: Any) -> None:
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    if any(not module.reads_inputs for module in model.modules() if isinstance(module, layer_class)):
        raise ValueError("Mixed batches (`adapter_names`) do not support adapters of parameters, as in LoRA.")
    existing = {name for module in model.modules() if isinstance(module, layer_class) for name in module.fggm_values}
    if missing := sorted(set(names) - existing - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(missing)}")


def _add_names(module: nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}


def mixed_batch_forward(layer: FGGMLayer, x: Tensor, *args, adapter_names: Sequence[str], **kwargs) -> Tensor:
    """The output of the base layer for the whole batch, plus each sample's own adapter."""
    if len(x) != len(adapter_names):
        lengths = f"{len(adapter_names)} and {len(x)} respectively"
        raise ValueError(f"Length of `adapter_names` should be the same as the number of inputs, but got {lengths}.")
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    mixed = output = layer.base_layer(x, *args, **kwargs)
    for name in dict.fromkeys(adapter_names):
        if layer.deltas([name]):
            samples = torch.tensor([n for n, other in enumerate(adapter_names) if other == name], device=output.device)
            adapted = layer.with_deltas(output[samples], [name], x[samples.to(x.device)])
            mixed = mixed.index_copy(0, samples, adapted)
    return mixed
