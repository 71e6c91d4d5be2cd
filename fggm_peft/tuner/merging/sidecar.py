"""Sidecars: finished deltas of a quantized layer, frozen and exact, whose product is added to the layer's output."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...core.granularity import Granularity, granularity_from
from ...core.linear import additive_linear
from ...core.weight_delta import WeightDelta, united

SIDECAR = "fggm_sidecar"
"""Name of the submodule in its layer."""


def with_sidecar(base_layer: nn.Module, deltas: Sequence[WeightDelta]) -> nn.Module:
    """A layer with the same weights, and with the deltas added to its sidecar; ``base_layer`` does not change."""
    twin = without_sidecar(base_layer)
    setattr(twin, SIDECAR, Sidecar([*sidecar_deltas(base_layer), *deltas]))
    twin.register_forward_hook(SidecarHook(), prepend=True)
    return twin


def without_sidecar(base_layer: nn.Module) -> nn.Module:
    """A layer with the same weights and no sidecar; ``base_layer`` does not change."""
    twin = copy.copy(base_layer)
    # dicts of its own, so that hooks and submodules may differ
    twin.__dict__ = {name: value.copy() if isinstance(value, dict) else value for name, value in vars(twin).items()}
    twin._modules.pop(SIDECAR, None)
    for key in [key for key, hook in twin._forward_hooks.items() if isinstance(hook, SidecarHook)]:
        del twin._forward_hooks[key]
    return twin


def sidecar_deltas(base_layer: nn.Module) -> list[WeightDelta]:
    """The deltas in a layer's sidecar, at most one of each granularity."""
    sidecar = getattr(base_layer, SIDECAR, None)
    return [] if sidecar is None else sidecar.deltas


class Sidecar(nn.Module):
    """The sum of deltas, with one support for each granularity.

    It is a submodule of its layer, and a forward hook of the layer adds its product. The layer keeps its class, and
    a later wrapper (FGGM, LoRA) adds to the output of both. Memory grows with the union of the supports,
    not with the number of tasks.
    """

    def __init__(self, deltas: Sequence[WeightDelta]):
        super().__init__()
        self._granularities: list[Granularity] = []
        for granularity in dict.fromkeys(delta.granularity for delta in deltas):
            parts = [
                WeightDelta(granularity, delta.indices, (delta.values * delta.scale).detach())
                for delta in deltas
                if delta.granularity == granularity
            ]
            total = parts[0] if len(parts) == 1 else united(parts)
            number = len(self._granularities)
            self._granularities.append(granularity)
            self.register_buffer(f"indices_{number}", total.indices.clone(), persistent=False)
            self.register_buffer(f"values_{number}", total.values, persistent=False)

    @property
    def deltas(self) -> list[WeightDelta]:
        buffers = self._buffers
        return [
            WeightDelta(granularity, buffers[f"indices_{number}"], buffers[f"values_{number}"])
            for number, granularity in enumerate(self._granularities)
        ]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if "base_layer." not in prefix:  # otherwise an adapter on top is being saved, without the base
            warnings.warn(
                "the state_dict and save_pretrained of the base omit the deltas that quantized_merge='keep' added to "
                "quantized layers. Save each adapter before merging it, and load the adapters again in order.",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return ", ".join(f"{len(delta.indices)} {delta.granularity.plural}" for delta in self.deltas)


def sidecars_of(model: nn.Module) -> dict[str, list[tuple[Any, Tensor, Tensor]]]:
    """The granularity, indices and values of the deltas in all sidecars, by the path of the quantized layer."""
    return {
        path.removesuffix(f".{SIDECAR}"): [(d.granularity.to_dict(), d.indices, d.values) for d in module.deltas]
        for path, module in model.named_modules()
        if isinstance(module, Sidecar)
    }


def add_sidecars_(model: nn.Module, sidecars: Mapping[str, Sequence[tuple[Any, Tensor, Tensor]]]) -> None:
    """Add sidecars that ``sidecars_of`` returned to the layers of a model."""
    for path, deltas in sidecars.items():
        layer = model.get_submodule(path)
        device = next(layer.parameters()).device
        added = [WeightDelta(granularity_from(g), i.to(device), v.to(device)) for g, i, v in deltas]
        model.set_submodule(path, with_sidecar(layer, added))


class SidecarHook:
    """Adds the product of a layer's sidecar to its output."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return additive_linear(output, args[0].to(output.dtype), sidecar_deltas(module))
