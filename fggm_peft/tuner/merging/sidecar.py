"""Finished deltas kept beside a quantized layer: frozen, exact, and in nobody's way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from ...core.granularity import Granularity
from ...core.linear import additive_linear
from ...core.weight_delta import WeightDelta, united

KEPT = "fggm_kept"


def keep_beside(base_layer: nn.Module, deltas: Sequence[WeightDelta]) -> nn.Module:
    """The same layer, weights shared, with the deltas beside it and what was kept before.

    ``base_layer`` itself stays as it is.
    """
    twin = without_kept(base_layer)
    setattr(twin, KEPT, KeptDelta(getattr(base_layer, KEPT, None), deltas))
    twin.register_forward_hook(KeptDeltaHook(), prepend=True)
    return twin


def without_kept(base_layer: nn.Module) -> nn.Module:
    """The same layer, weights shared, with nothing beside it; ``base_layer`` itself stays as it is."""
    twin = _shallow_copy(base_layer)
    twin._modules.pop(KEPT, None)
    for key in [key for key, hook in twin._forward_hooks.items() if isinstance(hook, KeptDeltaHook)]:
        del twin._forward_hooks[key]
    return twin


class KeptDelta(nn.Module):
    """Finished deltas beside a quantized layer: frozen, one support for each granularity.

    It is a submodule of the layer it belongs to, and a forward hook of that layer adds its product;
    so the layer keeps its class, and whatever wraps it next (FGGM, LoRA) adds to the kept output.
    Memory grows with the union of the supports, not with the number of tasks.
    """

    def __init__(self, previous: KeptDelta | None, deltas: Sequence[WeightDelta]):
        super().__init__()
        self._granularities: list[Granularity] = []  # the number of each is part of its buffers' names
        for delta in previous.deltas if previous is not None else []:
            self._add(delta)
        for delta in deltas:
            values = (delta.values * delta.scale).detach()
            self._add(WeightDelta(delta.granularity, delta.indices.clone(), values))

    @property
    def deltas(self) -> list[WeightDelta]:
        """The kept deltas, at most one of each granularity."""
        return [
            WeightDelta(granularity, self._buffers[f"indices_{n}"], self._buffers[f"values_{n}"])
            for n, granularity in enumerate(self._granularities)
        ]

    def _add(self, new: WeightDelta) -> None:
        if new.granularity not in self._granularities:
            self._granularities.append(new.granularity)
        n = self._granularities.index(new.granularity)
        if f"indices_{n}" in self._buffers:
            new = united([self.deltas[n], new])
        self.register_buffer(f"indices_{n}", new.indices, persistent=False)
        self.register_buffer(f"values_{n}", new.values, persistent=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if "base_layer." not in prefix:  # else an adapter on top is being saved, which is not about the base
            warnings.warn(
                "deltas that quantized_merge='keep' has put beside quantized layers are not part of the base's "
                "state_dict or save_pretrained. Save each adapter before merging it, and load them again in order.",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return ", ".join(f"{len(d.indices)} {d.granularity.name}s" for d in self.deltas)


class KeptDeltaHook:
    """Adds the product of a layer's ``KeptDelta`` to its output."""

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        kept = getattr(module, KEPT)
        return additive_linear(output, args[0].to(output.dtype), kept.deltas)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """The same weights in a module object of its own, so that hooks and submodules may differ."""
    twin = copy.copy(module)
    twin.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return twin
