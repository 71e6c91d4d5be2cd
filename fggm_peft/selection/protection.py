"""Keeps a new support away from the entries of earlier deltas.

Only the supports of earlier deltas are read. A unit's *protected share* is the share of its entries that lie in them,
and its score is multiplied by ``1 - protection * share``. With ``protection=1`` and deltas of the same granularity (or
new elements and earlier rows or columns) the supports are disjoint. If units cross, as rows and columns do, the score
is scaled and the supports may overlap.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.granularity import Granularity, granularity_from
from ..tuner.config import FGGMConfig
from ..tuner.files.task_scores import history_of
from ..tuner.support import bounds, unwrapped
from ..tuner.target import Targets, find_targets

Support = tuple[Granularity, Tensor]


class Protection:
    """The entries of earlier deltas in the targets.

    Args:
        targets: the targets of the new adapter.
        strength: the config's ``protection``.
        earlier: module path -> supports of earlier deltas.
    """

    def __init__(self, targets: Targets, strength: float, earlier: Mapping[str, Sequence[Support]]):
        self.targets, self.strength = targets, strength
        self.earlier = {path: supports for path, supports in earlier.items() if path in targets and strength}

    def share(self, path: str) -> Tensor:
        """The protected share of each unit of a module, ``[units]`` float32 on the CPU."""
        target = self.targets[path]
        is_protected = torch.zeros(target.shape)
        for granularity, indices in self.earlier[path]:
            ones = torch.ones(granularity.values_shape(target.shape, len(indices)))
            granularity.put_(is_protected, indices, ones)
        return target.granularity.reduce(is_protected) / target.granularity.parameters_per_unit(target.shape)

    def applied(self, path: str, scores: Tensor) -> Tensor:
        """The scores of a module's units, reduced by their protected share."""
        if path not in self.earlier:
            return scores
        return scores * (1 - self.strength * self.share(path)).to(scores.device)

    def require_enough(self, config: FGGMConfig) -> None:
        """Raise ``ValueError`` if the threshold asks for more than the protection leaves; says where and how much."""
        if self.strength < 1 or not self.earlier:
            return
        shares = {path: self.share(path) for path in self.earlier}
        if any(bool(((share > 0) & (share < 1)).any()) for share in shares.values()):
            warnings.warn(
                f"protection=1 cannot keep {config.granularity.plural} apart from earlier deltas that they cross: "
                "their scores are scaled by the free share. Use the earlier deltas' granularity, or 'element'.",
                stacklevel=4,
            )
        free = {path: int((share < 1).sum()) for path, share in shares.items()}
        ranked_together: dict[str, list[str]] = {}
        for path in self.targets:
            ranked_together.setdefault(path if config.policy(path).scope == "layer" else "", []).append(path)
        for name, paths in ranked_together.items():
            self._require_enough(config, name or "all modules together", {p: self.targets[p] for p in paths}, free)

    def _require_enough(self, config: FGGMConfig, name: str, targets: Targets, free: Mapping[str, int]) -> None:
        """The same for targets that are ranked together; ``free`` is the number of units that are not excluded."""
        policy, units = config.policy(next(iter(targets))), [target.units for target in targets.values()]
        sizes, types, most = bounds(targets, config)
        left = sum(size * free.get(path, n) for path, n, size in zip(targets, units, sizes, strict=True))
        least = max(min(sizes), policy.forecast(units, sizes, types, most).least)  # at least one unit if it adapts
        if left < least:
            total = sum(n * size for n, size in zip(units, sizes, strict=True))
            raise ValueError(
                f"{policy} selects {least} parameters of {name}, but protection=1 leaves {left} of {total}. Select "
                "fewer, protect fewer deltas, or lower the protection."
            )


def earlier_supports(
    model: nn.Module, config: FGGMConfig, adapter_name: str, protect: Sequence[str]
) -> dict[str, list[Support]]:
    """Module path -> the supports of the named deltas.

    Args:
        protect: folders, Hub ids, names of adapters on the model, or "history".

    Raises:
        AdapterFileError: a file is damaged, or was made for another base.
        ValueError: a name is not that of an FGGM delta.
    """
    supports: dict[str, list[Support]] = {}
    for name in protect:
        if name == adapter_name:
            raise ValueError(f"protect: {name!r} is the adapter that is being selected")
        for path, support in _supports_of(model, config, name):
            supports.setdefault(path, []).append(support)
    return supports


def _supports_of(model: nn.Module, config: FGGMConfig, name: str) -> list[tuple[str, Support]]:
    if name in getattr(model, "peft_config", {}):
        targets = find_targets(model, name).values()
        return [(target.path, (target.granularity, target.indices.cpu())) for target in targets]
    if name == "history":
        return [
            (path, (granularity_from(record.granularity), indices))
            for record in history_of(unwrapped(model), besides=config)
            for path, indices in record.supports.items()
        ]
    return supports_in_file(model, name)


def supports_in_file(model: nn.Module, name: str) -> list[tuple[str, Support]]:
    """The modules of a saved adapter and their supports. Of the values, only the shapes are read.

    Args:
        name: a folder or a Hub id.
    """
    from ..tuner.files.reading import read_supports  # slow to import, and needed by few

    config, supports = read_supports(name, model)
    return [(path, (config.granularity, indices)) for path, indices in supports.items()]
