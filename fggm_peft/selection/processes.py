"""The processes that take part in one selection, each with its own share of the data.

If ``torch.distributed`` is initialized, every process calls ``select_parameters``. Scores are summed over the processes
before the threshold, so that all of them select the same support.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from ..tuner.hosts.sharding import is_shard


class Processes:
    """Communication in the default group; a single process sends nothing.

    Every process must make the same calls in the same order.
    """

    def __init__(self) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if is_distributed else 1
        self.rank = dist.get_rank() if is_distributed else 0

    def share(self, model: nn.Module) -> bool:
        """Whether each process holds a part of the model, so that all of them must run it together."""
        return self.size > 1 and any(map(is_shard, model.parameters()))

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, the same to the bit on each of them. The tensor itself does not change."""
        if self.size == 1:
            return tensor
        on_device = tensor.device.type != "cpu" or dist.get_backend() in ("gloo", "mpi", "undefined")
        total = tensor.detach().clone().to(tensor.device if on_device else PartialState().device)
        dist.all_reduce(total)
        return total.to(tensor.device)

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Run a block that does not communicate. If it raises on one process, it raises on all.

        Raises:
            RuntimeError: on the processes without an error of their own; names the rank that failed.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                raise RuntimeError(f"{action} failed on rank {rank}: {report}")

    def require_same(self, what: str, values: Mapping[str, Any], advice: str) -> None:
        """Raise ``RuntimeError`` on every process unless ``values`` are the same on all; names the first difference.

        Values are plain types, sets or tensors.
        """
        texts = {key: json.dumps(value, sort_keys=True, default=_plain) for key, value in values.items()}
        first, *others = self.gather(texts)
        for rank, other in enumerate(others, start=1):
            for key in sorted(first.keys() | other.keys()):
                if first.get(key) != other.get(key):
                    a, b = (f"{texts.get(key, 'missing'):.80}" for texts in (first, other))
                    raise RuntimeError(
                        f"the ranks differ in {what}: {key} is {a} on rank 0 and {b} on rank {rank}. {advice}"
                    )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest()
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
