"""Running sums of the statistics of targets, in two halves of the samples, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import NonFiniteScoreError
from ..core.per_sample import PerSampleGradients
from ..core.statistics import STATISTICS, Features
from ..tuner.target import Target, Targets
from .processes import Processes


@dataclass(frozen=True)
class Totals:
    """Statistics of all samples that a pass has read.

    Args:
        sums: (module path, statistic) -> ``[2, size]``, summed over all processes.
        counts: number of samples in each half: with even numbers, with odd ones.
    """

    sums: Mapping[tuple[str, str], Tensor]
    counts: tuple[int, int]

    @property
    def samples(self) -> int:
        return sum(self.counts)

    @property
    def has_halves(self) -> bool:
        """Whether both halves contain samples."""
        return all(self.counts)

    def mean(self, path: str, statistic: str, half: int | None = None) -> Tensor:
        """A statistic of a module from all samples, or from one half of them."""
        sums = self.sums[path, statistic]
        if half is None:
            return STATISTICS[statistic].mean(sums.sum(0), self.samples)
        return STATISTICS[statistic].mean(sums[half], self.counts[half])


class RunningSums:
    """One tensor ``[2, size]`` float32 for each target and named statistic, on the target's device."""

    def __init__(self, targets: Targets, statistics: Sequence[str] = ("fisher",)):
        self.targets = targets
        self.statistics = {name: STATISTICS[name] for name in statistics}
        self.tensors = {
            (path, name): torch.zeros(2, entry.size(target.granularity, target.shape), device=target.indices.device)
            for path, target in targets.items()
            for name, entry in self.statistics.items()
        }

    @property
    def sides(self) -> set[str]:
        """What the statistics look at: "gradient", "input"."""
        return {statistic.looks_at for statistic in self.statistics.values()}

    @property
    def needs_backward(self) -> bool:
        return "gradient" in self.sides

    def add_(self, target: Target, side: str, measured: PerSampleGradients | Features, half: Tensor) -> None:
        """Add one batch to the statistics that look at ``side``."""
        for name, statistic in self.statistics.items():
            if statistic.looks_at == side:
                sums = self.tensors[target.path, name]
                statistic.add_(sums, target.granularity, measured, half)

    def require_finite(self, batch_index: int) -> None:
        """Raise ``NonFiniteScoreError`` if a sum is NaN or infinite; names the module and the batch."""
        device = next(iter(self.tensors.values())).device  # waiting for the device of each sum would take too long
        is_finite = torch.isfinite(torch.stack([sums.sum().to(device) for sums in self.tensors.values()])).cpu()
        if not is_finite.all():
            path, _ = list(self.tensors)[int((~is_finite).nonzero()[0])]
            raise NonFiniteScoreError(
                f"the scores of module {path} became NaN or infinite in batch {batch_index}. Check that batch; a "
                "float16 model may need bfloat16 or float32 for the selection pass."
            )

    def totals(self, processes: Processes, samples: int) -> Totals:
        """The statistics of all processes."""
        sums = {key: processes.sum(tensor) for key, tensor in self.tensors.items()}
        return Totals(sums, ((samples + 1) // 2, samples // 2))
