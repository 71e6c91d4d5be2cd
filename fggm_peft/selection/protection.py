"""Keeps a new support away from what earlier deltas have moved.

Only the supports of earlier deltas are read, from files that are checked as any adapter's are. A unit has a *protected
share*: how much of its entries lies in them. Its score is multiplied by ``1 - protection * share``. So with
``protection=1`` and deltas of the same granularity (or of rows or columns against new elements) the supports are
disjoint; where units cross, as rows and columns do, the score is scaled and the supports may meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.granularity import Granularity, granularity_from
from ..tuner.config import FGGMConfig
from ..tuner.files.task_scores import history_of
from ..tuner.layer import FGGMLayer
from ..tuner.support import bounds, fggm_layers, unwrapped
from ..tuner.target import Target

Support = tuple[Granularity, Tensor]


class Protection:
    """What earlier deltas hold of each module.

    Args:
        layers: module path -> layer that is about to get a support.
        adapter_name: of the new adapter.
        strength: the config's ``protection``.
        earlier: module path -> supports of earlier deltas.
    """

    def __init__(
        self,
        layers: Mapping[str, FGGMLayer],
        adapter_name: str,
        strength: float,
        earlier: Mapping[str, Sequence[Support]],
    ):
        self.layers, self.adapter_name, self.strength = layers, adapter_name, strength
        self.earlier = {name: held for name, held in earlier.items() if name in layers and strength}

    def share(self, name: str) -> Tensor:
        """The protected share of each unit of a module, ``[units]`` float32 on the CPU."""
        layer = self.layers[name]
        granularity = layer.granularity[self.adapter_name]
        held = torch.zeros(layer.weight_shape)
        for kind, indices in self.earlier[name]:
            kind.put_(held, indices, torch.ones(kind.values_shape(layer.weight_shape, len(indices))))
        return granularity.reduce(held) / granularity.parameters_per_unit(layer.weight_shape)

    def applied(self, name: str, scores: Tensor) -> Tensor:
        """The scores of a module, lower where earlier deltas are."""
        if name not in self.earlier:
            return scores
        return scores * (1 - self.strength * self.share(name)).to(scores.device)

    def require_enough(self, config: FGGMConfig) -> None:
        """Raise where less is left than the thresholds promise to choose.

        Raises:
            ValueError: says in which module, or that it is all of them together, and how much is left.
        """
        if self.strength < 1 or not self.earlier:
            return
        free, crosses = {}, False
        for name in self.earlier:
            share = self.share(name)
            free[name] = int((share < 1).sum())
            crosses |= bool(((share > 0) & (share < 1)).any())
        if crosses:
            warnings.warn(
                f"protection=1 cannot keep {config.granularity}s apart from earlier deltas that they cross: their "
                "scores are scaled by the share that is free. Use the earlier deltas' granularity, or 'element'.",
                stacklevel=4,
            )
        together: dict[str, list[str]] = {}
        for name in self.layers:
            policy = config.policy(name)
            key = name if policy.scope == "layer" else ""
            together.setdefault(key, []).append(name)
        for key, names in together.items():
            self._require_enough(config, key, names, free)

    def _require_enough(self, config: FGGMConfig, module: str, names: list[str], free: Mapping[str, int]) -> None:
        """The same for modules that are ranked together, of which ``free`` says how many units are not forbidden."""
        policy = config.policy(names[0])
        targets = {name: Target(name, self.layers[name], self.adapter_name) for name in names}
        costs, kinds, most = bounds(targets, config)
        units = [
            self.layers[name].granularity[self.adapter_name].units(self.layers[name].weight_shape) for name in names
        ]
        left = sum(cost * free.get(name, n) for name, n, cost in zip(names, units, costs, strict=True))
        wanted = max(min(costs), policy.forecast(units, costs, kinds, most).least)  # at least one unit, if it adapts
        if left < wanted:
            total = sum(n * cost for n, cost in zip(units, costs, strict=True))
            raise ValueError(
                f"{policy} wants {wanted} parameters of {module or 'all modules together'}, and protection=1 leaves "
                f"{left} of {total}. Choose fewer, protect fewer deltas, or lower the protection."
            )


def earlier_supports(
    model: nn.Module, config: FGGMConfig, adapter_name: str, protect: Sequence[str]
) -> dict[str, list[Support]]:
    """Module path -> what each of the named deltas holds of it.

    Args:
        protect: folders, Hub ids, names of adapters on the model, or "history".

    Raises:
        AdapterFileError: a file is damaged, or was made for another base.
        ValueError: a name stands for no FGGM delta.
    """
    found: dict[str, list[Support]] = {}
    for name in protect:
        if name == adapter_name:
            raise ValueError(f"protect: {name!r} is the adapter that is to be chosen")
        for module, support in _supports_of(model, config, name):
            found.setdefault(module, []).append(support)
    return found


def _supports_of(model: nn.Module, config: FGGMConfig, name: str) -> list[tuple[str, Support]]:
    if name in getattr(model, "peft_config", {}):
        layers = fggm_layers(model, name)
        return [(m, (layer.granularity[name], layer.fggm_indices[name].cpu())) for m, layer in layers.items()]
    if name == "history":
        return [
            (module, (granularity_from(record.granularity), indices))
            for record in history_of(unwrapped(model), besides=config)
            for module, indices in record.supports.items()
        ]
    return supports_in_file(model, name)


def supports_in_file(model: nn.Module, name: str) -> list[tuple[str, Support]]:
    """The modules of a saved adapter and what it holds of each; of the values only the shapes are read.

    Args:
        name: a folder or a Hub id.
    """
    from ..tuner.files.reading import read_supports  # of no use to most, so the package is imported without it

    config, supports = read_supports(name, model)
    granularity = config.granularity
    return [(module, (granularity, indices)) for module, indices in supports.items()]
