"""One pass over data that leaves nothing behind but running statistics.

Samples are numbered over all ranks, as one process would read them: batch by batch, rank by rank. The
number decides which half a sample belongs to and whether it is within the limit, so that one process
and several choose the same from the same data.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from ..core.errors import NonFiniteScoreError
from ..core.sketch import Sketch
from ..core.statistics import STATISTICS, Batch
from ..tuner.config import FGGMConfig
from ..tuner.hosts.sharding import is_shard
from ..tuner.layer import FGGMLayer
from ..tuner.support import unwrapped
from .frozen_model import untouched
from .hooks import CalledAgainError, ScoreCollector
from .likelihood import LogLikelihood, default_log_likelihood
from .out_of_memory import advised
from .processes import Ranks

SKETCH_SIZE = 16
"""Random projections of a sketch; the variance of a score is in proportion to 1 / it."""


@dataclass(frozen=True)
class Totals:
    """What a pass has gathered, or has so far.

    Args:
        sums: (module path, statistic) -> ``[2, size]``, summed over all ranks.
        counts: the number of samples in each half.
    """

    sums: Callable[[str, str], Tensor]
    counts: tuple[int, int]

    @property
    def samples(self) -> int:
        return sum(self.counts)

    @property
    def has_halves(self) -> bool:
        """Whether both halves contain samples."""
        return all(self.counts)

    def mean(self, module: str, statistic: str, half: int | None = None) -> Tensor:
        """A statistic from all samples, or from those of one half."""
        sums = self.sums(module, statistic)
        if half is None:
            return STATISTICS[statistic].mean(sums.sum(0), self.samples)
        return STATISTICS[statistic].mean(sums[half], self.counts[half])


class Round(NamedTuple):
    """One batch on every rank.

    Args:
        batch: this rank's batch, or None where its data has ended before that of the others.
        size: samples in it that count. 0 with a batch: the ranks hold a part of the model each, and this one
            goes along with the others without adding anything.
        first: number of its first sample.
        end: one past the number of the round's last sample on any rank.
    """

    batch: Mapping[str, Any] | None
    size: int
    first: int
    end: int


class FisherPass:
    """Statistics of a model on some data (by default its empirical Fisher), for any group of its FGGM layers.

    Args:
        model: has the layers; may be wrapped by PEFT.
        config: of the adapter: whose labels, exact or sketched scores, and the seed for what is drawn.
        adapter_name: its own delta is switched off meanwhile.
        dataloader: iterable of batches.
        log_likelihood: by default what fits the model's head.
        progress: show a bar on a terminal.
        ranks: the processes that read a share of the data each.
        statistics: names of what to gather.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FGGMConfig,
        adapter_name: str,
        dataloader: Iterable[Mapping[str, Any]],
        log_likelihood: LogLikelihood | None,
        progress: bool,
        ranks: Ranks | None = None,
        statistics: Sequence[str] = ("fisher",),
    ):
        if log_likelihood is not None and config.fisher_labels == "model":
            raise ValueError(
                "fisher_labels='model' draws labels in the library's own log-likelihoods and has no meaning with "
                "log_likelihood=; draw the labels in your function and set fisher_labels='data'"
            )
        self.model, self.config, self.adapter_name = model, config, adapter_name
        self.dataloader, self.log_likelihood, self.statistics = dataloader, log_likelihood, statistics
        self.ranks = ranks or Ranks()
        self.progress = progress and self.ranks.rank == 0
        self.generator = torch.Generator() if config.fisher_labels == "model" else None

    def over(self, dataloader: Iterable, statistics: Sequence[str], log_likelihood: LogLikelihood | None) -> FisherPass:
        """A pass over other data that is as this one otherwise."""
        result = copy.copy(self)
        result.dataloader, result.statistics, result.log_likelihood = dataloader, statistics, log_likelihood
        return result

    def require_repeatable(self, passes: int) -> None:
        """Raise ``ValueError`` if the data can be read only once."""
        if iter(self.dataloader) is self.dataloader:
            raise ValueError(
                f"score_memory makes {passes} passes over the data necessary, and this dataloader is an iterator that "
                "can be read once; pass a DataLoader or a list of batches"
            )

    def run(
        self,
        layers: dict[str, FGGMLayer],
        limit: int | None,
        enough: Callable[[Totals], bool] | None,
        first_check: int,
        description: str,
    ) -> Totals:
        """Gather until the limit, the end of the data, or ``enough``.

        Args:
            layers: module path -> layer to score.
            limit: samples at most.
            enough: asked at ``first_check`` samples and at every doubling, with what there is so far.

        Raises:
            ValueError: no batch, or one without labels.
            NonFiniteScoreError: a log-likelihood or a score is NaN or infinite.
        """
        log_likelihood, model = self._likelihood()
        seen, informed = 0, False
        with (
            untouched(self.model),
            self._switched_off(layers),
            self._collector(layers) as collector,
            tqdm(total=limit, desc=description, unit="sample", disable=None if self.progress else True) as bar,
        ):

            def so_far(name: str, statistic: str) -> Tensor:
                return self.ranks.sum(collector.sums[name][statistic])

            for index, round in enumerate(self._rounds(limit)):
                with self.ranks.together("the selection pass"), advised(index, round.batch):
                    informed |= self._score(collector, model, log_likelihood, round, index)
                bar.update(round.end - seen)
                seen = round.end
                if seen == limit:
                    break
                if enough is not None and seen >= first_check:
                    first_check *= 2
                    if enough(Totals(so_far, _halves(seen))):
                        break
            if not seen:
                raise ValueError("the dataloader is empty; select_parameters needs at least one batch")
            if collector.needs_backward and not any(self.ranks.gather(informed)):
                raise ValueError("all labels of all batches are -100: there is no answer to take a likelihood of")
        total = {
            (name, key): self.ranks.sum(sums)
            for name, of_module in collector.sums.items()
            for key, sums in of_module.items()
        }
        return Totals(lambda name, statistic: total[name, statistic], _halves(seen))

    def _collector(self, layers: dict[str, FGGMLayer]) -> ScoreCollector:
        plain = not _checkpoints(self.model)
        return ScoreCollector(
            layers,
            self.adapter_name,
            self.statistics,
            checkpointed_embeddings(self.model),
            sketch_of(self.config),
            hooks_tensors=plain,
            # a checkpointed input is not kept anyway; a rank that began a batch again would leave the others waiting
            digests=plain and self.ranks.size == 1,
        )

    def _rounds(self, limit: int | None) -> Iterator[Round]:
        """Batches of all ranks, cut to the samples that are still wanted, until the data of every rank has ended."""
        batches, start, spare = iter(self.dataloader), 0, None
        sharded = self.ranks.size > 1 and any(map(is_shard, self.model.parameters()))
        for index in itertools.count():
            with self._reading_together():
                batch = next(batches, None)
                size = 0 if batch is None else batch_size(batch, index)
            sizes = self.ranks.gather(size)
            if not any(sizes):
                return
            firsts = list(itertools.accumulate(sizes, initial=start))
            wanted = sizes
            if limit is not None:
                wanted = [max(0, min(n, limit - begin)) for n, begin in zip(sizes, firsts[:-1], strict=True)]
            if wanted[self.ranks.rank] < size:
                batch, size = _cut(batch, size, wanted[self.ranks.rank])
            start += sum(wanted)
            spare = batch if size else spare
            yield Round(spare if sharded and not size else batch, size, firsts[self.ranks.rank], start)

    def _reading_together(self) -> AbstractContextManager:
        """Where one rank reads for all (accelerate's dispatcher), the ranks already talk while they read."""
        if isinstance(self.dataloader, DataLoaderDispatcher):
            return nullcontext()
        return self.ranks.together("reading the data")

    def _likelihood(self) -> tuple[LogLikelihood, nn.Module]:
        if self.log_likelihood is not None:
            return self.log_likelihood, self.model
        base = unwrapped(self.model)
        log_likelihood = default_log_likelihood(base, self.config.task_type, self.generator)
        # a wrapper that FSDP2 has made the root of its shards gathers them in its own forward
        return log_likelihood, self.model if isinstance(self.model, FSDPModule) else base

    def _score(self, collector, model, log_likelihood, round: Round, index: int) -> bool:
        """Add one batch's scores; whether any sample of it had an answer."""
        if round.batch is None:
            return False
        if self.generator is not None:  # what is drawn for a sample must not depend on the number of ranks
            self.generator.manual_seed((self.config.seed * 0x9E3779B1 + round.first) % 2**63)
        batch = self._on_device(round.batch)
        half = (torch.arange(round.size or batch_size(batch, index)) + round.first) % 2
        mask = batch.get("attention_mask")
        padding = mask == 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        about = Batch(half, padding, round.first)
        with torch.set_grad_enabled(collector.needs_backward):
            try:
                collector.begin(about, bool(round.size))
                value = log_likelihood(model, batch)
            except CalledAgainError:  # from now on inputs are kept whole
                collector.begin(about, bool(round.size))
                value = log_likelihood(model, batch)
        if not isinstance(value, Tensor) or value.shape != half.shape:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_likelihood must return one number for each of {len(half)} samples, got {shape}")
        if not torch.isfinite(value).all():
            raise NonFiniteScoreError(f"the log-likelihood of batch {index} is NaN or infinite: {value.tolist()}")
        if collector.needs_backward:
            collector.backward(value if round.size else value * 0)
        collector.end(index)
        return bool(round.size and value.any())

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch where the model expects it; an offloaded model moves it itself."""
        device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        return dict(send_to_device(dict(batch), device))

    @contextmanager
    def _switched_off(self, layers: dict[str, FGGMLayer]):
        """The Fisher information is taken where training starts: without the adapter's own delta."""
        scales = {layer: layer.scaling[self.adapter_name] for layer in layers.values()}
        for layer in layers.values():
            layer.scaling[self.adapter_name] = 0.0
        try:
            yield
        finally:
            for layer, scale in scales.items():
                layer.scaling[self.adapter_name] = scale


def sketch_of(config: FGGMConfig) -> Sketch | None:
    """What estimates the scores, if the config does not want them exact."""
    return Sketch(SKETCH_SIZE, config.seed) if config.fisher_estimate == "sketch" else None


def _checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def checkpointed_embeddings(model: nn.Module) -> nn.Module | None:
    """The input embeddings, if the model checkpoints its gradients."""
    if not _checkpoints(model):
        return None
    get = getattr(unwrapped(model), "get_input_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:  # transformers' own answer for a model without one
        return None


def _halves(samples: int) -> tuple[int, int]:
    """How many numbers below ``samples`` are even, and how many are odd."""
    return (samples + 1) // 2, samples // 2


def batch_size(batch: Any, index: int) -> int:
    """How many samples a batch has.

    Raises:
        ValueError: it is no dict of tensors.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch {index} is a {type(batch).__name__}; batches must be dicts as the model takes them")
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError(f"batch {index} has no tensors")
    return len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else len(tensors[0])


def _cut(batch: Mapping[str, Any] | None, size: int, room: int) -> tuple[Mapping[str, Any] | None, int]:
    """The first ``room`` samples of a batch of ``size``."""
    if batch is None or not room:
        return None, 0
    cut = {
        key: value[:room] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for key, value in batch.items()
    }
    return cut, room
