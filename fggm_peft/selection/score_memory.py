"""Groups of targets whose running sums fit into ``score_memory`` together. Each group is one pass over the data."""

from __future__ import annotations

from ..core.criteria import CRITERIA, Criterion
from ..core.statistics import STATISTICS
from ..tuner.config import FGGMConfig
from ..tuner.settings.selection import score_bytes
from ..tuner.target import Target, Targets
from .data_pass import DataPass
from .reference import Reference


def group_targets(
    targets: Targets, config: FGGMConfig, task: DataPass, reference: Reference | None, score_memory: int | str | None
) -> list[Targets]:
    """The targets in groups; one group without ``score_memory``.

    Raises:
        ValueError: the memory holds no single module, or several passes are needed and not possible.
    """
    if score_memory is None:
        return [targets]
    measured = reference.measured if reference else []
    bound = score_bytes(score_memory)
    groups: list[Targets] = []
    used = bound + 1
    for path, target in targets.items():
        size = running_bytes(target, CRITERIA[config.criterion], len(measured))
        if size > bound:
            raise ValueError(
                f"score_memory={score_memory!r} is too small: the scores of {path} alone take {size} bytes"
            )
        if used + size > bound:
            groups.append({})
            used = 0
        groups[-1][path] = target
        used += size
    if len(groups) > 1:
        if any(config.policy(path).scope == "global" for path in targets):
            raise ValueError(
                "a threshold of global scope requires the scores of all modules at once, and "
                f"score_memory={score_memory!r} is too small for them. Raise it, or use scope='layer'."
            )
        for data in (task, *(source.data for source in measured)):
            data.require_repeatable(len(groups))
        if reference and measured and len(reference.sources) > 1:
            raise ValueError(
                "several references are scaled by their means over all modules, and score_memory is too small for the "
                "scores of all modules at once. Raise it, or use one reference or saved ones (report.save_scores)."
            )
    return groups


def running_bytes(target: Target, criterion: Criterion, sources: int) -> int:
    """Bytes of the running sums of one module: two halves in float32, of the task and of each reference.

    Args:
        sources: number of references that are read from data and not from saved scores.
    """
    names = [*criterion.task, *criterion.reference * sources]
    return 2 * 4 * sum(STATISTICS[name].size(target.granularity, target.shape) for name in names)
