"""The processes that take part in one selection, each with its own share of the data.

With ``torch.distributed`` initialised, every rank calls ``select_parameters``: scores are summed over
ranks before the threshold, so that all ranks choose the same support. Without, there is one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


class Ranks:
    """Talks to the other processes of the default group; a rank that is alone sends nothing.

    Every rank must make the same calls in the same order.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    def gather(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same to the bit on each of them; the tensor itself is left alone."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone().to(self._device(tensor.device))
        dist.all_reduce(total)
        return total.to(tensor.device)

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Run a block that makes no calls of its own; where it raises on one rank, it raises on all.

        Raises:
            RuntimeError: on the ranks where nothing went wrong, naming the one where it did.
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
                raise RuntimeError(f"{doing} failed on rank {rank}: {report}")

    def require_same(self, what: str, value: Mapping[str, Any], advice: str) -> None:
        """Raise unless ``value`` is the same on every rank.

        Raises:
            RuntimeError: on every rank; names the first key that differs and what two ranks have there.
        """
        values = self.gather({key: json.dumps(entry, sort_keys=True, default=_plain) for key, entry in value.items()})
        for rank, other in enumerate(values):
            for key in sorted(values[0].keys() | other.keys()):
                if values[0].get(key) != other.get(key):
                    raise RuntimeError(
                        f"the ranks differ in {what}: {key} is {_short(values[0].get(key))} on rank 0 and "
                        f"{_short(other.get(key))} on rank {rank}. {advice}"
                    )

    @staticmethod
    def _device(device: torch.device) -> torch.device:
        """Where the default group can reduce a tensor that lives on ``device``."""
        if device.type != "cpu" or dist.get_backend() in ("gloo", "mpi", "undefined"):
            return device
        return PartialState().device


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named integer tensors, the same on every device and machine."""
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(name.encode())
        result.update(tensor.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return result.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _short(text: str | None) -> str:
    text = "missing" if text is None else text
    return text if len(text) <= 80 else text[:77] + "..."
