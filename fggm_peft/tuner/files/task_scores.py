"""What is remembered of a task after its adapter is gone: the statistics of its data, and what was allowed to move.

``select_parameters`` puts a record of each selection on the base model, in the plain list ``fggm_history``, which
outlives ``merge_and_unload``. The statistics can be saved; single elements are kept as row sums x column sums, so that
a record takes a few numbers for each row and column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core.errors import ScoreFileError
from ...core.granularity import Granularity, Shape, granularity_from
from ...core.statistics import ones

if TYPE_CHECKING:
    from ..config import FGGMConfig

SCORES_FILE = "fggm_scores.safetensors"
HISTORY = "fggm_history"
_FORMAT = "fggm_scores 1"
_RECORD = "fggm_record"

Kept = tuple[Tensor, ...]
"""One vector, or the row sums and the column sums of a matrix; float32 on the CPU."""


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """One task.

    Args:
        granularity: of the scores and supports.
        samples: how many samples the scores are the mean over.
        base: name or path of the base model.
        scores: statistic -> module path -> what is kept of it.
        supports: module path -> ``[k]`` the units that were allowed to move. Not part of the file.
    """

    granularity: str | dict[str, Any]
    samples: int
    base: str
    scores: Mapping[str, Mapping[str, Kept]]
    supports: Mapping[str, Tensor] = field(default_factory=dict)

    def values(self, statistic: str, module: str, granularity: Granularity, shape: Shape) -> Tensor:
        """A statistic of one module for units of ``granularity``, on the CPU; raises what ``require`` does."""
        kept = self.require(statistic, module, granularity, shape)
        if len(kept) == 1:
            return kept[0]
        rows, columns = kept
        total = float(rows.double().sum())
        return granularity.reduce(torch.outer(rows, columns / total if total else columns))

    def require(self, statistic: str, module: str, granularity: Granularity, shape: Shape) -> Kept:
        """What is kept of a statistic of one module.

        Raises:
            ScoreFileError: nothing, or it is of another shape or granularity; says which.
        """
        kept = self.scores.get(statistic, {}).get(module)
        if kept is None:
            has = ", ".join(self.scores) or "no statistics"
            raise ScoreFileError(
                f"the scores of an earlier task have no {statistic!r} of module {module}; they have {has}. They were "
                "made for another base, or by a criterion that gathers something else."
            )
        if len(kept) == 1 and self.granularity != granularity.to_dict():
            raise ScoreFileError(
                f"the scores are of {granularity_from(self.granularity)}s, but {granularity}s are selected; only "
                "scores of elements serve every granularity"
            )
        found = [len(part) for part in kept]
        expected = list(shape) if len(kept) == 2 else [len(ones(statistic, granularity, shape))]
        if found != expected:
            raise ScoreFileError(
                f"the scores were made for another base ({self.base or 'unnamed'}): {statistic!r} of {module} has "
                f"{found} numbers there, {expected} here"
            )
        return kept

    def tensors(self) -> dict[str, Tensor]:
        """The scores by name, as ``scores_from`` takes them."""
        return {
            f"{statistic}/{module}{suffix}": tensor.contiguous()
            for statistic, modules in self.scores.items()
            for module, kept in modules.items()
            for suffix, tensor in zip(("",) if len(kept) == 1 else ("/rows", "/columns"), kept, strict=True)
        }

    def save(self, path: Path) -> Path:
        """Write the scores, whole or not at all; a folder gets the usual file name.

        Raises:
            ValueError: there are none.
        """
        if not self.scores:
            raise ValueError("this selection gathered no statistics that a later task could take for a reference")
        path = path / SCORES_FILE if path.is_dir() else path
        metadata = {"granularity": self.granularity, "samples": self.samples, "base": self.base}
        partial = path.with_name(path.name + ".partial")
        save_file(self.tensors(), partial, {"format": _FORMAT, "fggm": json.dumps(metadata)})
        partial.replace(path)
        return path


def load_record(path: str | Path) -> TaskRecord:
    """Saved scores, from a file or from an adapter's folder that holds them.

    Raises:
        FileNotFoundError: there is no such file.
        ScoreFileError: it holds no scores, or they are damaged.
    """
    file = Path(path).expanduser()
    file = file / SCORES_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"no saved scores in {str(path)!r}: report.save_scores(path) or save_scores=True on the config writes them"
        )
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ScoreFileError(f"{file} holds no scores of fggm_peft (format {header.get('format')!r})")
            metadata = json.loads(header["fggm"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        granularity, samples, base = metadata["granularity"], metadata["samples"], metadata["base"]
        try:
            granularity_from(granularity)
        except ValueError as error:
            raise ScoreFileError(f"the scores in {file} cannot be read: {error}") from error
        if not isinstance(samples, int) or not isinstance(base, str):
            raise ScoreFileError(f"the scores in {file} are damaged: their metadata are {metadata}")
        return TaskRecord(granularity, samples, base, scores_from(tensors, str(file)))
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ScoreFileError(f"the scores in {file} are damaged: {error}") from error


def scores_from(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Kept]]:
    """The scores that ``TaskRecord.tensors`` gave.

    Args:
        where: they come from, for errors.

    Raises:
        KeyError: the column sums of a module are missing.
        ScoreFileError: a tensor is no vector of finite numbers that are not negative.
    """
    scores: dict[str, dict[str, Kept]] = {}
    for key, tensor in tensors.items():
        legal = tensor.dtype == torch.float32 and tensor.dim() == 1
        if not legal or not torch.isfinite(tensor).all() or (tensor < 0).any():
            raise ScoreFileError(f"{where}: {key} is no vector of finite float32 numbers >= 0")
        statistic, module, *part = key.split("/")
        modules = scores.setdefault(statistic, {})
        if part != ["columns"]:
            modules[module] = (tensor,) if not part else (tensor, tensors[f"{statistic}/{module}/columns"])
    return scores


def kept_of(values: Tensor, granularity: Granularity, shape: Shape) -> Kept:
    """What is remembered of a module's statistic: of one number for each entry, the row and the column sums."""
    values = values.detach().to("cpu", torch.float32)
    if values.numel() == shape[0] * shape[1] and granularity.parameters_per_unit(shape) == 1:
        matrix = values.view(shape)
        return matrix.sum(1), matrix.sum(0)
    return (values.clone(),)


def history_of(model: nn.Module, besides: FGGMConfig | None = None) -> list[TaskRecord]:
    """The records on a base model, oldest first, without that of the adapter with the given config."""
    own = None if besides is None else record_of(besides)
    return [record for record in getattr(model, HISTORY, []) if record is not own]


def remember(model: nn.Module, config: FGGMConfig, record: TaskRecord) -> None:
    """Put a record on the base model, in place of an earlier one of the same adapter."""
    setattr(model, HISTORY, [*history_of(model, config), record])
    setattr(config, _RECORD, record)


def record_of(config: FGGMConfig) -> TaskRecord | None:
    """What was remembered of the adapter with this config, in this process."""
    return getattr(config, _RECORD, None)
