"""What the model should keep: the statistics of general text, of earlier tasks, or of text that the model writes.

Several sources are added. Each is divided by its mean over the entries of all modules first, because the size of a
task's Fisher information depends on the length of its answers and on how well the model knows it. The mean is over all
modules and not of each one, since the comparison of modules within a source is information. A single source is used as
it is.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn

from ..core.criteria import CRITERIA
from ..core.statistics import STATISTICS, ones
from ..tuner.files.input_covariance import InputCovariance, load_input_covariance
from ..tuner.files.task_scores import TaskRecord, history_of, load_record
from ..tuner.settings.selection import check_reference, require_reference
from ..tuner.support import unwrapped
from ..tuner.target import Targets
from .data_pass import DataPass
from .input_covariance import input_covariance
from .likelihood import IGNORED, task_type_of
from .processes import Processes
from .running_sums import Totals
from .self_text import written_batches

WRITTEN_TEXTS = 64  # for reference="self"
WRITTEN_LENGTH = 128  # tokens of each text, at most

ReferenceData = Any
"""A dataloader, "self", "history", a file or folder of saved scores, or a list of these.

Trainers, sequences and the command line have a tokenizer and accept files of general text (.txt) as well.
"""


class Source(ABC):
    """One part of a reference."""

    samples: int = 0

    @abstractmethod
    def values(self, path: str, statistic: str, half: int | None) -> Tensor:
        """A statistic of a module, from all samples or, if the source has halves, from one half of them."""


class SavedSource(Source):
    """The saved statistics of an earlier task."""

    def __init__(self, record: TaskRecord, targets: Targets, statistics: Sequence[str]):
        self.record, self.targets = record, targets
        for path, target in targets.items():
            for statistic in statistics:
                record.require(statistic, path, target.granularity, target.shape)

    def values(self, path, statistic, half):
        target = self.targets[path]
        return self.record.values(statistic, path, target.granularity, target.shape).to(target.indices.device)


class MeasuredSource(Source):
    """Data read during this selection, one group of modules at a time; ``totals`` holds the statistics."""

    def __init__(self, data: DataPass):
        self.data = data
        self.totals: Totals | None = None

    def values(self, path, statistic, half):
        assert self.totals is not None
        return self.totals.mean(path, statistic, half if self.totals.has_halves else None)


class Reference:
    """The sources of one selection.

    Args:
        sources: empty if there is no earlier task; then the task alone decides.
        targets: all targets of the adapter.
    """

    def __init__(self, sources: list[Source], targets: Targets):
        self.sources, self.targets = sources, targets
        self._means: dict[Any, float] = {}

    @property
    def measured(self) -> list[MeasuredSource]:
        return [source for source in self.sources if isinstance(source, MeasuredSource)]

    @property
    def samples(self) -> int:
        """Samples that were read for the reference during this selection."""
        return sum(source.samples for source in self.measured)

    def values(self, path: str, statistic: str, half: int | None = None) -> Tensor:
        """A statistic of one module; ones without any source."""
        if not self.sources:
            target = self.targets[path]
            return ones(statistic, target.granularity, target.shape).to(target.indices.device)
        if len(self.sources) == 1:
            return self.sources[0].values(path, statistic, half)
        total = torch.zeros(())
        for source in self.sources:
            values = source.values(path, statistic, half)
            total = total.to(values.device) + values / self._scale(source, statistic)
        return total

    def forget_means(self) -> None:
        """Compute means anew, because a source was measured again."""
        self._means.clear()

    def mean(self, statistic: str, paths: tuple[str, ...], half: int | None = None) -> float:
        """The mean over the entries of the modules."""
        return self._mean(paths, statistic, half, lambda path: self.values(path, statistic, half), None)

    def _scale(self, source: Source, statistic: str) -> float:
        """The divisor of a source: its mean over the entries of all modules."""
        paths = tuple(self.targets)
        return self._mean(paths, statistic, None, lambda path: source.values(path, statistic, None), source) or 1.0

    def _mean(self, paths, statistic: str, half, values: Callable[[str], Tensor], source: Source | None) -> float:
        key = paths, statistic, half, source
        if key not in self._means:
            total = count = 0.0
            for path in paths:
                target, numbers = self.targets[path], values(path)
                total += float(numbers.double().sum())
                count += STATISTICS[statistic].entries(target.granularity, target.shape) * len(numbers)
            self._means[key] = total / count
        return self._means[key]


class _LabeledText:
    """Batches of general text; a batch without labels gets its own tokens as labels."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]):
        self.batches = batches

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(_labeled, iter(self.batches))


def _labeled(batch: Any) -> Any:
    if not isinstance(batch, Mapping) or "labels" in batch or not isinstance(batch.get("input_ids"), Tensor):
        return batch
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, IGNORED)}


class _WrittenText:
    """Text that the model writes when the pass begins to read it, in the state in which the pass has put the model."""

    def __init__(self, model: nn.Module, seed: int, processes: Processes):
        self.model, self.seed, self.processes = model, seed, processes
        self.batches: list[dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.batches is None:
            self.batches = written_batches(self.model, WRITTEN_TEXTS, WRITTEN_LENGTH, self.seed)
        yield from self.batches[self.processes.rank :: self.processes.size]


def reference_entries(given: ReferenceData, task: DataPass) -> list[Any]:
    """The parts of a reference: data, "history", or paths of saved statistics. "self" becomes the text itself.

    Args:
        given: the argument of ``select_parameters``; None for the config's reference.
        task: the pass over the task's data.

    Raises:
        ValueError: the config needs a reference and has none, or uses none and has one.
    """
    config = task.config
    entries = _as_list(config.reference if given is None else given)
    check_reference(config, entries)
    require_reference(config, entries)
    for entry in entries:
        if is_text_file(entry):
            raise ValueError(
                f"the reference {str(entry)!r} is a text, and select_parameters has no tokenizer for it. Pass "
                "fggm_peft.training.text_batches(file, tokenizer), or select in an FGGMTrainer or by fggm select"
            )
        if isinstance(entry, Iterator) and config.needs_covariance and CRITERIA[config.criterion].reference:
            raise ValueError("the reference is an iterator but is read twice; pass a DataLoader or a list of batches")
    return [
        _WrittenText(task.model, config.seed, task.processes) if isinstance(entry, str) and entry == "self" else entry
        for entry in entries
    ]


def find_reference(entries: Sequence[Any], targets: Targets, task: DataPass) -> Reference | None:
    """The reference of the criterion; None if it uses none.

    Args:
        entries: the result of ``reference_entries``.
        targets: all targets of the adapter.
        task: the pass over the task's data; passes over the reference have the same settings.

    Raises:
        ScoreFileError: saved scores do not fit.
    """
    config = task.config
    names = CRITERIA[config.criterion].reference
    if not names:
        return None
    sources: list[Source] = []
    for entry in entries:
        if isinstance(entry, _WrittenText):
            sources.append(MeasuredSource(replace(task, dataloader=entry, statistics=names, log_likelihood=None)))
        elif isinstance(entry, (str, Path)):
            is_history = entry == "history"
            records = history_of(unwrapped(task.model), besides=config) if is_history else [load_record(entry)]
            sources += [SavedSource(record, targets, names) for record in records]
        else:
            data = entry
            if _is_causal(task):  # an iterator remains one, because it cannot be read twice
                data = map(_labeled, entry) if isinstance(entry, Iterator) else _LabeledText(entry)
            sources.append(MeasuredSource(replace(task, dataloader=data, statistics=names)))
    if not sources:
        warnings.warn("the history is empty, so the task alone decides what is selected", stacklevel=4)
    return Reference(sources, targets)


def covariance_to_retain(
    model: nn.Module,
    entries: Sequence[Any],
    widths: Mapping[str, int],
    history: InputCovariance | None,
    progress: bool = True,
) -> InputCovariance:
    """The sum of the input covariances of a reference; zero if the history is empty.

    Args:
        entries: data, "history", or paths of saved statistics.
        widths: module path -> number of input features.
        history: the statistics of earlier tasks; None if there is none.

    Raises:
        NonFiniteScoreError: an input is NaN or infinite; names the module.
        ScoreFileError: saved statistics do not fit.
        ValueError: a module is not a linear layer.
    """
    sources: list[InputCovariance | None] = []
    for entry in entries:
        if isinstance(entry, (str, Path)):
            saved = history if entry == "history" else load_input_covariance(entry)
            if saved is not None:
                saved.require_fits(widths)
            sources.append(saved)
        else:
            sources.append(input_covariance(model, entry, modules=widths, progress=progress))
    found = [source for source in sources if source is not None]
    if not found:
        warnings.warn("the history is empty, so that harm decay has nothing to retain yet", stacklevel=4)
        return InputCovariance.zero(widths)
    return sum(found[1:], start=found[0])


def is_text_file(source: Any) -> bool:
    """Whether a reference names a file of general text."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt"


def _as_list(given: ReferenceData) -> list[Any]:
    """The entries of a reference; a list of batches is one entry."""
    if given is None:
        return []
    has_several = isinstance(given, (list, tuple)) and not any(isinstance(entry, Mapping) for entry in given)
    return list(given) if has_several else [given]


def _is_causal(task: DataPass) -> bool:
    return (task.config.task_type or task_type_of(unwrapped(task.model))) == TaskType.CAUSAL_LM
