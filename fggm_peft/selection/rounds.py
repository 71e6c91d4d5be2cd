"""Reads batches on all processes at a time, and numbers their samples.

Samples are numbered as one process would read them: batch by batch, process by process. The number decides which half
a sample belongs to and whether it is within the limit, so that several processes select the same as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm

from ..tuner.support import unwrapped
from .processes import Processes

_STANDING_FOR_OTHERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


class Round(NamedTuple):
    """One batch on every process.

    Args:
        number: of the batch, from 0.
        batch: the batch of this process; None if its data has ended before that of the others.
        size: samples of the batch that count. If it is 0 and there is a batch, the model is sharded: this process runs
            the batch for the others and adds nothing.
        first: number of the batch's first sample.
        end: number of the round's last sample on any process, plus 1.
    """

    number: int
    batch: Mapping[str, Any] | None
    size: int
    first: int
    end: int

    @property
    def rows(self) -> int:
        """Number of samples in the batch, whether they count or not."""
        return self.size or _batch_size(self.batch, self.number)

    def divided(self, config: Any = None) -> Iterator[Round]:
        """The round, one sample at a time; ``ValueError`` if the batch cannot be divided."""
        if self.size < 2 or self.batch is None:
            yield self
            return
        if not is_divisible(self.batch, self.size, config):
            shapes = {name: list(value.shape) for name, value in self.batch.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"batch {self.number} of {self.size} samples cannot be split into samples: {shapes}. Use a dataloader "
                "with batch size 1, or exclude_modules."
            )
        for sample in range(self.size):
            batch = samples_of(self.batch, sample, sample + 1)
            yield self._replace(batch=batch, size=1, first=self.first + sample)


def rounds(
    model: nn.Module, dataloader: Iterable, processes: Processes, limit: int | None, description: str, progress: bool
) -> Iterator[Round]:
    """Batches of all processes until the data of every process has ended, truncated to ``limit`` samples.

    Batches are on the model's device. A batch that cannot be divided is used as a whole, so that there may be more
    samples than the limit. If each process holds a part of the model, every process gets a batch in every round.

    Args:
        description: of the progress bar, which is shown on a terminal if ``progress``.

    Raises:
        ValueError: there is no batch, or a batch is not a dict with tensors.
    """
    config, is_sharded = getattr(model, "config", None), processes.share(model)
    is_quiet = None if progress and processes.rank == 0 else True
    # with accelerate's dispatcher, one process reads for all, and the processes already communicate as they read
    is_dispatched = isinstance(dataloader, DataLoaderDispatcher)
    batches, start, spare = iter(dataloader), 0, None
    with tqdm(total=limit, desc=description, unit="sample", disable=is_quiet) as bar:
        for number in itertools.count():
            with nullcontext() if is_dispatched else processes.together("reading the data"):
                batch = next(batches, None)
                size = 0 if batch is None else _batch_size(batch, number)
                is_whole = batch is not None and not is_divisible(batch, size, config)
                if batch is not None:
                    batch = send_to_device(dict(batch), device_of(model))
            sizes = _within(limit, start, processes.gather((size, is_whole)))
            if not any(sizes):
                if not start:
                    raise ValueError("the dataloader is empty, so there is nothing to read")
                return
            if batch is not None and sizes[processes.rank] < size:
                size = sizes[processes.rank]
                batch = samples_of(batch, 0, size) if size else None
            first, start = start + sum(sizes[: processes.rank]), start + sum(sizes)
            spare = batch if size else spare
            bar.update(sum(sizes))
            yield Round(number, spare if is_sharded and not size else batch, size, first, start)
            if limit is not None and start >= limit:
                return


def _within(limit: int | None, start: int, batches: list[tuple[int, bool]]) -> list[int]:
    """The number of samples of each process's batch that are within the limit, or all if it cannot be divided."""
    sizes = []
    for size, is_whole in batches:
        left = size if limit is None else max(0, limit - start)
        sizes.append(size if is_whole and left else min(size, left))
        start += size
    return sizes


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs; an offloaded model moves them itself."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def callable_base(model: nn.Module) -> nn.Module:
    """The base model with its adapted layers, or the wrapper whose forward gathers the shards of FSDP2."""
    return model if isinstance(model, FSDPModule) else unwrapped(model)


def samples_of(batch: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Some samples of a batch that can be divided."""
    return {k: value[start:end] if isinstance(value, Tensor) and value.dim() else value for k, value in batch.items()}


def _batch_size(batch: Any, number: int) -> int:
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch {number} is a {type(batch).__name__}; batches must be dicts as the model takes them")
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError(f"batch {number} has no tensors; pass a DataLoader, whose collator makes batches of rows")
    if isinstance(ids := batch.get("input_ids"), Tensor) and ids.dim() == 1:
        raise ValueError(f"batch {number} is a single row; pass a DataLoader, whose collator makes batches of rows")
    return len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else len(tensors[0])


def is_divisible(batch: Mapping[str, Any], size: int, config: Any = None) -> bool:
    """Whether entry ``s`` of every tensor of a batch belongs to sample ``s``.

    Images and sounds are listed one after the other, so that there may be as many of them as samples although a sample
    has two and another none. The tokens that stand for them tell; ``config`` of the model names these tokens.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    ids = tensors.get("input_ids")
    if any(len(value) != size for value in tensors.values()):
        return False
    if ids is None or all(value.dim() < 3 for name, value in tensors.items() if name != "inputs_embeds"):
        return True
    tokens = [token for name in _STANDING_FOR_OTHERS if (token := getattr(config, name, None)) is not None]
    counts = [torch.eq(ids, token).flatten(1).any(1) for token in tokens]
    return all(bool(has.all()) or not bool(has.any()) for has in counts)
