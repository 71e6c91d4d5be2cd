"""Reads batches on all processes at a time, and numbers their samples.

Samples are numbered as one process would read them: batch by batch, process by process. The number decides which half
a sample belongs to and whether it is within the limit, so that several processes select the same as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor

from .processes import Processes


class Round(NamedTuple):
    """One batch on every process.

    Args:
        batch: the batch of this process; None if its data has ended before that of the others.
        size: samples of the batch that count. 0 with a batch: each process holds a part of the model, and this one
            takes part without adding anything.
        first: number of the batch's first sample.
        end: number of the round's last sample on any process, plus 1.
    """

    batch: Mapping[str, Any] | None
    size: int
    first: int
    end: int


def rounds(dataloader: Iterable, processes: Processes, limit: int | None, is_sharded: bool) -> Iterator[Round]:
    """Batches of all processes until the data of every process has ended, truncated to ``limit`` samples.

    Args:
        is_sharded: each process holds a part of the model, so that all of them must go through it in every round.
    """
    batches, start, spare = iter(dataloader), 0, None
    for index in itertools.count():
        with _reading_together(dataloader, processes):
            batch = next(batches, None)
            size = 0 if batch is None else batch_size(batch, index)
        sizes = processes.gather(size)
        if not any(sizes):
            return
        firsts = list(itertools.accumulate(sizes, initial=start))
        if limit is not None:
            sizes = [max(0, min(n, limit - first)) for n, first in zip(sizes, firsts[:-1], strict=True)]
        if sizes[processes.rank] < size:
            batch, size = _truncated(batch, size, sizes[processes.rank])
        start += sum(sizes)
        spare = batch if size else spare
        yield Round(spare if is_sharded and not size else batch, size, firsts[processes.rank], start)


def _reading_together(dataloader: Iterable, processes: Processes) -> AbstractContextManager:
    """With accelerate's dispatcher, one process reads for all, and the processes already communicate as they read."""
    is_dispatched = isinstance(dataloader, DataLoaderDispatcher)
    return nullcontext() if is_dispatched else processes.together("reading the data")


def batch_size(batch: Any, index: int) -> int:
    """Number of samples of a batch.

    Raises:
        ValueError: it is not a dict of tensors.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch {index} is a {type(batch).__name__}; batches must be dicts as the model takes them")
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError(f"batch {index} has no tensors")
    return len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else len(tensors[0])


def _truncated(batch: Mapping[str, Any] | None, size: int, length: int) -> tuple[Mapping[str, Any] | None, int]:
    """The first ``length`` samples of a batch of ``size``."""
    if batch is None or not length:
        return None, 0
    first = {
        key: value[:length] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
        for key, value in batch.items()
    }
    return first, length
