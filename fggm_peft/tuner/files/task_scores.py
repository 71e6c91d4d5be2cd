"""The record of a finished task: the statistics of its data.

``select_parameters`` adds a record of each selection to the list ``fggm_history`` on the base model, where it survives
``merge_and_unload``. Statistics of single elements are stored as row sums and column sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.errors import ScoreFileError
from ...core.granularity import Granularity, Shape, granularity_from
from ...core.statistics import ones
from .atomic import read_tensors, write_tensors
from .hub import user_path

if TYPE_CHECKING:
    from ..config import FGGMConfig

SCORES_FILE = "fggm_scores.safetensors"
HISTORY = "fggm_history"
_FORMAT = "fggm_scores 1"
_RECORD = "fggm_record"

StoredScores = tuple[Tensor, ...]
"""One vector, or the row sums and the column sums of a matrix; float32 on the CPU."""


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """The scores of one task.

    Args:
        granularity: JSON form of the granularity of the scores.
        samples: number of samples that the scores are averaged over.
        base: name or path of the base model.
        scores: statistic -> module path -> stored scores.
    """

    granularity: str | dict[str, Any]
    samples: int
    base: str
    scores: Mapping[str, Mapping[str, StoredScores]]

    def values(self, statistic: str, module: str, granularity: Granularity, shape: Shape) -> Tensor:
        """A statistic of one module for units of ``granularity``, on the CPU; raises what ``require`` raises."""
        stored = self.require(statistic, module, granularity, shape)
        if len(stored) == 1:
            return stored[0]
        rows, columns = stored
        total = float(rows.double().sum())
        return granularity.reduce(torch.outer(rows, columns / total if total else columns))

    def require(self, statistic: str, module: str, granularity: Granularity, shape: Shape) -> StoredScores:
        """The stored scores of one module; ``ScoreFileError`` if they are missing or do not fit."""
        stored = self.scores.get(statistic, {}).get(module)
        if stored is None:
            known = ", ".join(self.scores) or "nothing"
            raise ScoreFileError(f"the scores of an earlier task have no {statistic!r} of {module}, only {known}")
        kind = granularity_from(self.granularity)
        if len(stored) == 1 and kind.of_weight(module, shape) != granularity:
            raise ScoreFileError(
                f"the scores are of {kind.plural}, not {granularity.plural}; only those of elements fit all"
            )
        lengths = [len(part) for part in stored]
        expected = list(shape) if len(stored) == 2 else [len(ones(statistic, granularity, shape))]
        if lengths != expected:
            problem = f"{statistic!r} of {module} has {lengths} numbers there, {expected} here"
            raise ScoreFileError(f"the scores were made for another base ({self.base or 'unnamed'}): {problem}")
        return stored

    def save(self, path: Path) -> Path:
        """Write the scores to a file or folder; ``ValueError`` if the record has none. The file is never incomplete."""
        if not self.scores:
            raise ValueError("this selection collected no statistics that a later task could use as a reference")
        path = path / SCORES_FILE if path.is_dir() else path
        tensors: dict[str, Tensor] = {}
        for statistic, modules in self.scores.items():
            for module, stored in modules.items():
                suffixes = ("",) if len(stored) == 1 else ("/rows", "/columns")
                tensors |= {f"{statistic}/{module}{s}": tensor for s, tensor in zip(suffixes, stored, strict=True)}
        metadata = {"granularity": self.granularity, "samples": self.samples, "base": self.base}
        write_tensors(path, tensors, _FORMAT, metadata)
        return path


def load_record(path: str | Path) -> TaskRecord:
    """Load saved scores from a file, or from an adapter's folder; ``ScoreFileError`` if they are damaged."""
    file = user_path(path)
    file = file / SCORES_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"no saved scores in {str(path)!r}: report.save_scores(path) or save_scores=True on the config writes them"
        )
    with read_tensors(file, _FORMAT, ScoreFileError) as (metadata, tensors):
        granularity, samples, base = metadata["granularity"], metadata["samples"], metadata["base"]
        granularity_from(granularity)
        if not isinstance(samples, int) or not isinstance(base, str):
            raise ScoreFileError(f"{file} is damaged: its metadata are {metadata}")
        return TaskRecord(granularity, samples, base, _scores_from(tensors, file))


def _scores_from(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, StoredScores]]:
    """Statistic -> module path -> stored scores; ``ScoreFileError`` unless they are vectors of numbers >= 0."""
    scores: dict[str, dict[str, StoredScores]] = {}
    for key, tensor in tensors.items():
        is_vector = tensor.dtype == torch.float32 and tensor.dim() == 1
        if not is_vector or not torch.isfinite(tensor).all() or (tensor < 0).any():
            raise ScoreFileError(f"{file}: {key} is not a vector of finite float32 numbers >= 0")
        statistic, module, *part = key.split("/")
        modules = scores.setdefault(statistic, {})
        if part != ["columns"]:
            modules[module] = (tensor,) if not part else (tensor, tensors[f"{statistic}/{module}/columns"])
    return scores


def stored_scores(values: Tensor, granularity: Granularity, shape: Shape) -> StoredScores:
    """A module's statistic as it is stored: row sums and column sums if there is one number for each entry."""
    values = values.detach().to("cpu", torch.float32)
    if values.numel() == shape[0] * shape[1] and granularity.parameters_per_unit(shape) == 1:
        matrix = values.view(shape)
        return matrix.sum(1), matrix.sum(0)
    return (values.clone(),)


def history_of(model: nn.Module, besides: FGGMConfig | None = None) -> list[TaskRecord]:
    """The records on a base model, oldest first, except that of the adapter with the given config."""
    own = None if besides is None else record_of(besides)
    return [record for record in getattr(model, HISTORY, []) if record is not own]


def remember(model: nn.Module, config: FGGMConfig, record: TaskRecord) -> None:
    """Add a record to the base model; it replaces an earlier one of the same adapter."""
    setattr(model, HISTORY, [*history_of(model, config), record])
    setattr(config, _RECORD, record)


def record_of(config: FGGMConfig) -> TaskRecord | None:
    """The record of the adapter with this config, from this process."""
    return getattr(config, _RECORD, None)
