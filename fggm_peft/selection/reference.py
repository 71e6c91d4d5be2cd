"""What the model should keep: the same statistics of general text, of earlier tasks, or of text of its own.

Several sources are added. Each is first divided by its mean over all modules' entries, since how large a task's
Fisher information is depends on the length of its answers and on how well it is known. Over all modules, not in each:
how modules compare within a source is what it has to say. A source that is alone is taken as it is.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn

from ..core.criteria import CRITERIA
from ..core.statistics import STATISTICS, ones
from ..tuner.config import FGGMConfig
from ..tuner.files.task_scores import TaskRecord, history_of, load_record
from ..tuner.layer import FGGMLayer
from ..tuner.settings.selection import check_reference, require_reference
from ..tuner.support import unwrapped
from .data_pass import FisherPass, Totals
from .likelihood import IGNORED, task_type_of
from .processes import Ranks
from .self_text import written_batches

WRITTEN_TEXTS = 64  # for reference="self"
WRITTEN_LENGTH = 128  # tokens of each text, at most

Layers = Mapping[str, FGGMLayer]
ReferenceData = Any
"""A dataloader, "self", "history", a file or folder of saved scores, or a list of these.

Trainers, sequences and the command line, which have a tokenizer, take files of general text (.txt) as well.
"""


class Source(ABC):
    """One thing that the model should keep."""

    samples: int = 0

    @abstractmethod
    def values(self, name: str, statistic: str, half: int | None) -> Tensor:
        """A statistic of a module, from all samples or those of one half (from all, where there are no halves)."""


class SavedSource(Source):
    """An earlier task, as its record has it."""

    def __init__(self, record: TaskRecord, layers: Layers, adapter_name: str, statistics: Sequence[str]):
        self.record, self.layers, self.adapter_name = record, layers, adapter_name
        for name, layer in layers.items():
            for statistic in statistics:
                record.require(statistic, name, layer.granularity[adapter_name], layer.weight_shape)

    def values(self, name, statistic, half):
        layer = self.layers[name]
        granularity = layer.granularity[self.adapter_name]
        values = self.record.values(statistic, name, granularity, layer.weight_shape)
        return values.to(layer.fggm_indices[self.adapter_name].device)


class LiveSource(Source):
    """Data that are passed over now, for one group of modules at a time; ``totals`` is what came of it."""

    def __init__(self, fisher_pass: FisherPass):
        self.fisher_pass = fisher_pass
        self.totals: Totals | None = None

    def values(self, name, statistic, half):
        assert self.totals is not None
        has_halves = self.totals.has_halves
        return self.totals.mean(name, statistic, half if has_halves else None)


class Reference:
    """The sources of one selection together.

    Args:
        sources: none where the history is empty; everything is harmed alike then.
        layers: module path -> layer.
        adapter_name: whose granularity it is.
    """

    def __init__(self, sources: list[Source], layers: Layers, adapter_name: str):
        self.sources, self.layers, self.adapter_name = sources, layers, adapter_name
        self._means: dict[Any, float] = {}

    @property
    def live(self) -> list[LiveSource]:
        return [source for source in self.sources if isinstance(source, LiveSource)]

    @property
    def samples(self) -> int:
        """Samples that were passed over for it now."""
        return sum(source.samples for source in self.live)

    def values(self, name: str, statistic: str, half: int | None = None) -> Tensor:
        """A statistic of one module; ones, where nothing is known yet."""
        if not self.sources:
            layer = self.layers[name]
            device = layer.fggm_indices[self.adapter_name].device
            return ones(statistic, layer.granularity[self.adapter_name], layer.weight_shape).to(device)
        if len(self.sources) == 1:
            return self.sources[0].values(name, statistic, half)
        total = torch.zeros(())
        for source in self.sources:
            values = source.values(name, statistic, half)
            total = total.to(values.device) + values / self._scale(source, statistic)
        return total

    def forget(self) -> None:
        """A source has measured anew: its means are others."""
        self._means.clear()

    def mean(self, statistic: str, names: tuple[str, ...], half: int | None = None) -> float:
        """The mean over the entries of the named modules."""
        key = statistic, names, half
        if key not in self._means:
            self._means[key] = self._mean_of(lambda name: self.values(name, statistic, half), statistic, names)
        return self._means[key]

    def _scale(self, source: Source, statistic: str) -> float:
        """What a source is divided by: its mean over all modules' entries."""
        key = source, statistic
        if key not in self._means:
            mean = self._mean_of(lambda name: source.values(name, statistic, None), statistic, self.layers)
            self._means[key] = mean or 1.0
        return self._means[key]

    def _mean_of(self, values: Callable[[str], Tensor], statistic: str, names: Iterable[str]) -> float:
        total = count = 0.0
        for name in names:
            layer, found = self.layers[name], values(name)
            each = STATISTICS[statistic].entries(layer.granularity[self.adapter_name], layer.weight_shape)
            total, count = total + float(found.double().sum()), count + each * len(found)
        return total / count


class _Labelled:
    """General text as the pass takes it: batches without labels get their own tokens for labels."""

    def __init__(self, batches: Iterable[Mapping[str, Any]]):
        self.batches = batches

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(_labelled, iter(self.batches))


def _labelled(batch: Any) -> Any:
    if not isinstance(batch, Mapping) or "labels" in batch or not isinstance(batch.get("input_ids"), Tensor):
        return batch
    labels, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": labels if mask is None else labels.masked_fill(mask == 0, IGNORED)}


class _Written:
    """Text of the model's own, written when the pass begins to read it: in the state that the pass has put it in."""

    def __init__(self, model: nn.Module, config: FGGMConfig, ranks: Ranks):
        self.model, self.config, self.ranks = model, config, ranks
        self.batches: list[dict[str, Tensor]] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.batches is None:
            self.batches = written_batches(self.model, WRITTEN_TEXTS, WRITTEN_LENGTH, self.config.seed)
        yield from self.batches[self.ranks.rank :: self.ranks.size]


def find_reference(given: ReferenceData, layers: Layers, task: FisherPass) -> Reference | None:
    """The reference of a selection; None where the criterion looks at none.

    Args:
        given: what ``select_parameters`` got; None for what the config says.
        layers: module path -> layer.
        task: the pass over the task's data, whose settings those over the reference have.

    Raises:
        ValueError: the criterion needs a reference and there is none, or looks at none and there is one.
        ScoreFileError: saved scores do not fit.
    """
    config = task.config
    criterion = CRITERIA[config.criterion]
    sources = _listed(config.reference if given is None else given)
    check_reference(config.criterion, sources)
    if not criterion.reference:
        return None
    require_reference(config.criterion, sources)
    found: list[Source] = []
    for source in sources:
        if is_text_file(source):
            raise ValueError(
                f"the reference {str(source)!r} is a text, which select_parameters has no tokenizer for. Pass "
                "fggm_peft.training.texts.text_batches(file, tokenizer), or select in an FGGMTrainer or by fggm select"
            )
        if isinstance(source, (str, Path)) and source != "self":
            earlier = source == "history"
            records = history_of(unwrapped(task.model), besides=config) if earlier else [load_record(source)]
            found += [SavedSource(record, layers, task.adapter_name, criterion.reference) for record in records]
        elif source == "self":
            written = _Written(task.model, config, task.ranks)
            found.append(LiveSource(task.over(written, criterion.reference, log_likelihood=None)))
        else:
            data = source
            if _is_causal(task):  # an iterator stays one: it cannot be passed over twice
                data = map(_labelled, source) if isinstance(source, Iterator) else _Labelled(source)
            found.append(LiveSource(task.over(data, criterion.reference, task.log_likelihood)))
    if not found:
        warnings.warn("the history is empty, so nothing but the task itself decides what may move", stacklevel=4)
    return Reference(found, layers, task.adapter_name)


def is_text_file(source: Any) -> bool:
    """Whether a reference names a file of general text."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".txt"


def _listed(given: ReferenceData) -> list[Any]:
    """The sources; a list of batches is one."""
    if given is None:
        return []
    several = isinstance(given, (list, tuple)) and not any(isinstance(entry, Mapping) for entry in given)
    return list(given) if several else [given]


def _is_causal(task: FisherPass) -> bool:
    return (task.config.task_type or task_type_of(unwrapped(task.model))) == TaskType.CAUSAL_LM
