"""What the model should keep: the statistics of general text, of earlier tasks, or of text that the model writes.

Several sources are added. Each is divided by its mean over the entries of all modules first, because the size of a
task's Fisher information depends on the length of its answers and on how well the model knows it. The mean is over all
modules and not of each one, since the comparison of modules within a source is information. A single source is used as
it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..tuner.target import Target, Targets
from .data_pass import DataPass
from .frozen_model import frozen_in_eval_mode, without_delta
from .input_covariance import input_covariance
from .likelihood import IGNORED, task_type_of
from .running_sums import Totals
from .self_text import written_batches

WRITTEN_TEXTS = 64  # for reference="self"
WRITTEN_LENGTH = 128  # tokens of each text, at most

ReferenceData = Any
"""A dataloader, "self", "history", an ``InputCovariance``, a file or folder of saved scores, or a list of these.

Trainers, sequences and the command line have a tokenizer and accept files of general text (.txt) as well.
"""


@dataclass(eq=False)
class Source:
    """One part of a reference: the saved statistics of an earlier task, or data that are read during this selection."""

    record: TaskRecord | None = None
    data: DataPass | None = None  # reads one group of modules at a time
    totals: Totals | None = None  # of the pass

    def values(self, target: Target, statistic: str, half: int | None) -> Tensor:
        """A statistic of a module from all samples or, if the source has halves, from one half of them."""
        if self.record is not None:
            saved = self.record.values(statistic, target.path, target.granularity, target.shape)
            return saved.to(target.indices.device)
        assert self.totals is not None
        return self.totals.mean(target.path, statistic, half if self.totals.has_halves else None)


class Reference:
    """The sources of one selection. Without any, every statistic is 1, so that the task alone decides."""

    def __init__(self, sources: Sequence[Source], targets: Targets):
        self.sources, self.targets = sources, targets
        self._means: dict[Any, float] = {}

    def values(self, target: Target, statistic: str, half: int | None = None) -> Tensor:
        """A statistic of one module."""
        if not self.sources:
            return ones_of(target, statistic)
        if len(self.sources) == 1:
            return self.sources[0].values(target, statistic, half)
        total = torch.zeros((), device=target.indices.device)
        for source in self.sources:
            scale = self._mean(source, tuple(self.targets), statistic, None) or 1.0
            total = total + source.values(target, statistic, half) / scale
        return total

    def mean(self, paths: tuple[str, ...], statistic: str, half: int | None = None) -> float:
        """The mean over the entries of the modules."""
        return self._mean(self, paths, statistic, half)

    def _mean(self, of: Source | Reference, paths: tuple[str, ...], statistic: str, half: int | None) -> float:
        key = of, paths, statistic, half
        if key not in self._means:
            total = count = 0.0
            for target in (self.targets[path] for path in paths):
                numbers = of.values(target, statistic, half)
                total += float(numbers.double().sum())
                count += STATISTICS[statistic].entries(target.granularity, target.shape) * len(numbers)
            self._means[key] = total / count
        return self._means[key]


def ones_of(target: Target, statistic: str) -> Tensor:
    """The statistic of a module with every number 1."""
    return ones(statistic, target.granularity, target.shape).to(target.indices.device)


class OwnText(list[Mapping[str, Any]]):
    """Batches of text that the model has written."""


def own_text(model: nn.Module, seed: int) -> OwnText:
    """What the reference "self" stands for, the same on every process."""
    with frozen_in_eval_mode(model):
        return OwnText(written_batches(model, WRITTEN_TEXTS, WRITTEN_LENGTH, seed))


def _with_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch of general text without labels gets its own tokens as labels."""
    if "labels" in batch or not isinstance(batch.get("input_ids"), Tensor):
        return batch
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, IGNORED)}


def reference_entries(given: ReferenceData, targets: Targets, task: DataPass) -> list[Any]:
    """The parts of a reference: data, "history", or paths of saved statistics. "self" becomes the text itself.

    Args:
        given: the argument of ``select_parameters``; None for the config's reference.
        targets: all targets of the adapter, whose delta does not count.

    Raises:
        TypeError: an entry is none of these.
        ValueError: the config needs a reference and has none, or uses none and has one.
    """
    config = task.config
    entries = _as_list(config.reference if given is None else given)
    check_reference(config, entries)
    require_reference(config, entries)
    for number, entry in enumerate(entries):
        if not isinstance(entry, (Iterable, Path, InputCovariance)):
            raise TypeError(
                "a reference is a dataloader, an InputCovariance, a path, 'self', 'history', or a list of these, not "
                f"a {type(entry).__name__}"
            )
        if is_text_file(entry):
            raise ValueError(
                f"the reference {str(entry)!r} is a text, and select_parameters has no tokenizer for it. Pass "
                "fggm_peft.training.text_batches(file, tokenizer), or select in an FGGMTrainer or by fggm select"
            )
        if isinstance(entry, Iterator) and config.needs_covariance and CRITERIA[config.criterion].reference:
            raise ValueError("the reference is an iterator but is read twice; pass a DataLoader or a list of batches")
        if isinstance(entry, str) and entry == "self":
            with without_delta(targets):
                batches = own_text(task.model, config.seed)
            entries[number] = OwnText(batches[task.processes.rank :: task.processes.size])
    return entries


def find_sources(entries: Sequence[Any], targets: Targets, task: DataPass) -> list[Source]:
    """The parts of the reference of the criterion, from ``reference_entries``; empty if it uses none.

    References are read with the same settings as the task.

    Raises:
        ScoreFileError: saved scores do not fit.
        ValueError: an ``InputCovariance``, which has no scores.
    """
    config, base = task.config, unwrapped(task.model)
    names, task_type = CRITERIA[config.criterion].reference, config.task_type or task_type_of(base)
    sources: list[Source] = []
    for entry in entries if names else ():
        if isinstance(entry, InputCovariance):
            raise ValueError(
                f"criterion {config.criterion!r} needs scores of the reference, and an InputCovariance has none. Pass "
                "data, or use criterion='gain_under_decay'"
            )
        if not isinstance(entry, (str, Path)):
            prepare = _with_labels if task_type == TaskType.CAUSAL_LM else None
            log_likelihood = None if isinstance(entry, OwnText) else task.log_likelihood
            data = replace(task, dataloader=entry, statistics=names, log_likelihood=log_likelihood, prepare=prepare)
            sources.append(Source(data=data))
            continue
        for record in history_of(base, besides=config) if entry == "history" else [load_record(entry)]:
            for path, target in targets.items():
                for statistic in names:
                    record.require(statistic, path, target.granularity, target.shape)
            sources.append(Source(record))
    if names and not sources:
        warnings.warn("the history is empty, so the task alone decides what is selected", stacklevel=4)
    return sources


def covariance_to_retain(
    model: nn.Module,
    entries: Sequence[Any],
    widths: Mapping[str, int],
    history: InputCovariance | None,
    progress: bool = True,
) -> InputCovariance:
    """The sum of the input covariances of a reference; zero if the history is empty.

    Args:
        entries: data, "history", statistics, or paths of saved statistics.
        widths: module path -> number of input features.
        history: the statistics of earlier tasks, or None.

    Raises:
        ScoreFileError: saved statistics do not fit.
        ValueError: the earlier tasks have other modules.
    """
    if history is not None and "history" in entries and (other := sorted(history.inputs.keys() ^ widths.keys())):
        raise ValueError(
            f"the reference 'history' needs the same modules in all tasks, and {other[0]} is not adapted in "
            f"{'this task' if other[0] in history else 'the earlier tasks'}. Use the same target_modules for all tasks"
        )
    sources = []
    for entry in entries:
        if isinstance(entry, str) and entry == "history":
            entry = history
        elif isinstance(entry, (str, Path)):
            entry = load_input_covariance(entry)
        elif not isinstance(entry, InputCovariance):
            entry = input_covariance(model, entry, modules=widths, progress=progress)
        if entry is not None:
            sources.append(entry.of_modules(widths))
    if not sources:
        warnings.warn("the history is empty, so that harm decay has nothing to retain yet", stacklevel=4)
        return InputCovariance.zero(widths)
    return sum(sources[1:], start=sources[0])


def is_text_file(source: Any) -> bool:
    """Whether a reference names a file of general text."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt"


def _as_list(given: ReferenceData) -> list[Any]:
    """The entries of a reference; a list of batches is one entry."""
    if given is None:
        return []
    has_several = isinstance(given, (list, tuple)) and not any(isinstance(entry, Mapping) for entry in given)
    return list(given) if has_several else [given]
