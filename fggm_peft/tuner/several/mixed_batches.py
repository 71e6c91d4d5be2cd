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
"""The name, PEFT's, of no adapter at all."""


@contextmanager
def adapter_of_each_sample(model: nn.Module, layer_class: type, names: Any, num_beams: Any) -> Iterator[None]:
    """Tell the adapted layers, and modules that are trained whole, which adapter each sample uses.

    Args:
        model: the tuner.
        layer_class: of the layers that take ``adapter_names`` in their forward.
        names: one for each sample; ``"__base__"`` for no adapter. None: nothing is done.
        num_beams: of ``generate``: the decoder sees every sample that many times, the encoder once.

    Raises:
        ValueError: the model is in training mode, or there is no such adapter.
        TypeError: ``names`` is no list.
    """
    if names is None:
        yield
        return
    names = _checked(model, layer_class, names)
    beams = num_beams if isinstance(num_beams, int) else 1
    encoder = _encoder(model)
    once = set() if encoder is None else set(encoder.modules())
    handles = []
    for module in model.modules():
        if isinstance(module, (layer_class, AuxiliaryTrainingWrapper)):
            seen = names if module in once else [name for name in names for _ in range(beams)]
            handles.append(module.register_forward_pre_hook(partial(_pass_names, names=seen), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _checked(model: nn.Module, layer_class: type, names: Any) -> list[str]:
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    known = {name for module in model.modules() if isinstance(module, layer_class) for name in module.fggm_values}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    return list(names)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that has a decoder too."""
    if not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    return None if encoder is model.model else encoder  # a model without one gives itself


def _pass_names(module: nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}


def mixed_batch_forward(layer: FGGMLayer, names: Sequence[str], x: Tensor, *args, **kwargs) -> Tensor:
    """What each sample's own adapter makes of it: one product of the base, and the delta's of each part of the batch.

    Args:
        names: as many as ``x`` has samples.

    Raises:
        ValueError: another number of names, or an adapter is merged.
    """
    if len(x) != len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {len(x)} respectively."
        )
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    output = layer.base_layer(x, *args, **kwargs)
    mixed = output
    for name in dict.fromkeys(names):
        if not layer.deltas([name]):
            continue
        part = torch.tensor([number for number, other in enumerate(names) if other == name], device=output.device)
        of_part = layer.with_deltas(output[part], [name], x[part.to(x.device)])
        mixed = mixed.index_copy(0, part, of_part)
    return mixed
