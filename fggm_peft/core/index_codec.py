"""How the indices of a support are written to a file: lossless, and near the entropy where they are many.

``k`` sorted, unique indices below ``n`` carry ``log2 C(n, k)`` bits; as int32 they take 3 to 11 times as much. The
gaps between random indices are geometric, and for those the Golomb-Rice code (Golomb 1966, Rice 1979) is within a few
percent. It is never larger than Elias-Fano or a bitmask, which is what it becomes where no low bits are worth keeping.
Streams are plain uint8 tensors that describe themselves by their shapes, given ``k``; bit ``j`` of a stream is bit
``j % 8`` of byte ``j // 8``. A codec is one class here and one line in the registry; a granularity names those that it
may use.

Streams come from strangers: what does not decode to exactly ``k`` sorted, unique indices below ``n``, or has a bit too
much, is a ``ValueError``, and nothing larger than a small multiple of the stream is ever allocated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy  # torch has no packbits, and finds set bits seven times slower
import torch
from torch import Tensor

from .registry import Registry


def index_dtype(n: int) -> torch.dtype:
    """What indices below ``n`` are kept as."""
    return torch.int32 if n < 2**31 else torch.int64


def entropy_bytes(k: int, n: int) -> float:
    """``log2 C(n, k)`` in bytes: what ``k`` of ``n`` cannot be written in less than, on the average."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


class IndexCodec(ABC):
    """One way to write sorted, unique indices as tensors."""

    name: ClassVar[str]  # set by the registry
    parts: ClassVar[tuple[str, ...]]
    """What the tensors are called in a file, after ``fggm_``."""

    @abstractmethod
    def nbytes(self, indices: Tensor, n: int) -> int:
        """The exact size of what ``encode`` gives."""

    @abstractmethod
    def most_bytes(self, k: int, sizes: Sequence[int]) -> int:
        """What ``k`` indices take at most in any supports together, of which each is below its size."""

    @abstractmethod
    def encode(self, indices: Tensor, n: int) -> tuple[Tensor, ...]:
        """One tensor for each of ``parts``, on the CPU, from ``[k]`` sorted, unique integers below ``n``."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor], k: int, n: int) -> Tensor:
        """The indices, ``[k]`` of ``index_dtype(n)`` on the CPU.

        Raises:
            ValueError: the tensors are no encoding of ``k`` of ``n``.
        """


INDEX_CODECS: Registry[IndexCodec] = Registry("index codec", make=lambda codec: codec(), named=True)


@INDEX_CODECS.register("plain")
class Plain(IndexCodec):
    """The indices as they are."""

    parts = ("indices",)

    def nbytes(self, indices, n):
        return len(indices) * index_dtype(n).itemsize

    def most_bytes(self, k, sizes):
        return k * max(index_dtype(n).itemsize for n in sizes)

    def encode(self, indices, n):
        return (indices.to("cpu", index_dtype(n)),)

    def decode(self, tensors, k, n):
        (indices,) = tensors
        if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
            raise ValueError(f"expected a vector of int32 or int64, got {describe(indices)}")
        if len(indices) != k:
            raise ValueError(f"{len(indices)} indices for {k} values")
        _require_support(indices.cpu().numpy(), n)
        return indices.to("cpu", index_dtype(n))


@INDEX_CODECS.register("golomb_rice")
class GolombRice(IndexCodec):
    """The gap before each index, its low ``l`` bits as they are and the rest in unary.

    With ``g_j = x_j - x_(j-1) - 1`` and ``x_(-1) = -1``: ``indices_lo`` ``[l, ceil(k / 8)]`` holds bit ``p`` of every
    gap in plane ``p``; ``indices_hi`` holds ``g_j >> l`` zeros and a one for every gap, and ends with the byte of the
    last one. With ``l = 0`` that is the bitmask of the support.
    """

    parts = ("indices_hi", "indices_lo")

    def nbytes(self, indices, n):
        gaps = _gaps(indices.to("cpu", torch.int64).numpy())
        return self._nbytes(gaps, self._low_bits(gaps, n))

    def most_bytes(self, k, sizes):
        total = sum(sizes)
        choices = range((total // max(1, k)).bit_length() + 1)
        return min(self._most_bytes(k, total, low_bits, len(sizes)) for low_bits in choices)

    def _most_bytes(self, k: int, total: int, low_bits: int, supports: int) -> int:
        """With one number of low bits everywhere, which is no better than what ``encode`` finds for each support.

        The gaps add up to what is left out, and each stream's last byte may be nearly empty.
        """
        bits = k + (total - k >> low_bits) + low_bits * k
        return bits // 8 + 1 + supports * (1 + low_bits)

    def _nbytes(self, gaps: numpy.ndarray, low_bits: int) -> int:
        return _bytes(len(gaps) + int((gaps >> low_bits).sum())) + low_bits * _bytes(len(gaps))

    def _low_bits(self, gaps: numpy.ndarray, n: int) -> int:
        most = (n // max(1, len(gaps))).bit_length()  # the best is below it, and far below where indices are clustered
        return min(range(most + 1), key=lambda low_bits: self._nbytes(gaps, low_bits))

    def encode(self, indices, n):
        gaps = _gaps(indices.to("cpu", torch.int64).numpy())
        low_bits = self._low_bits(gaps, n)
        ones = ((gaps >> low_bits) + 1).cumsum() - 1
        unary = numpy.zeros(ones[-1] + 1 if len(ones) else 0, dtype=bool)
        unary[ones] = True
        low = numpy.empty((low_bits, _bytes(len(gaps))), dtype=numpy.uint8)
        for plane in range(low_bits):
            low[plane] = _packed((gaps >> plane) & 1)
        return torch.from_numpy(_packed(unary)), torch.from_numpy(low)

    def decode(self, tensors, k, n):
        high, low = tensors
        low_bits = len(low) if low.dim() == 2 else 0
        if low_bits > n.bit_length():
            raise ValueError(f"{low_bits} low bits, and indices below {n} have {n.bit_length()}")
        _require_bytes("indices_lo", low, (low_bits, _bytes(k)))
        if high.dtype != torch.uint8 or high.dim() != 1:
            raise ValueError(f"indices_hi: expected a vector of uint8, got {describe(high)}")
        if not _bytes(k) <= len(high) <= _bytes(k + (n >> low_bits)):
            raise ValueError(f"indices_hi: {len(high)} bytes cannot hold {k} indices below {n}")
        ones = numpy.flatnonzero(_bits(high).view(bool))  # of booleans it is faster than of bytes
        if len(ones) != k or _bytes(ones[-1] + 1 if k else 0) != len(high):
            raise ValueError(f"indices_hi: {len(ones)} bits are set for {k} values, or bytes follow the last")
        # the gaps before an index add up to what the zeros before its one stand for, and the sum of the low bits
        largest = (8 * len(high) << low_bits) + (k << low_bits)
        dtype = index_dtype(largest + 1)  # half as much to read and write as int64, wherever nothing can overflow
        x = torch.from_numpy(ones).to(dtype).bitwise_left_shift_(low_bits)
        if low_bits:
            x -= torch.arange(k, dtype=dtype).mul_((1 << low_bits) - 1)
            x += torch.from_numpy(self._low(low, k)).cumsum(0, dtype=dtype)
        _require_support(x.numpy(), n)
        return x.to(index_dtype(n))

    def _low(self, low: Tensor, k: int) -> numpy.ndarray:
        """The low bits of every gap, in a small dtype that holds them: less to read and write."""
        gaps: numpy.ndarray = numpy.zeros(k, dtype=numpy.uint8 if len(low) <= 8 else numpy.int64)
        for plane, stream in enumerate(low):
            bits = _bits(stream)
            if bits[k:].any():
                raise ValueError(f"indices_lo: a bit is set beyond the last of {k}")
            gaps |= bits[:k].astype(gaps.dtype) << gaps.dtype.type(plane)
        return gaps


INDEX_PARTS = tuple(part for name in INDEX_CODECS for part in INDEX_CODECS[name].parts)
"""Every name that a tensor of indices may have in a file, after ``fggm_``."""
ENCODED_PARTS = tuple(part for part in INDEX_PARTS if part not in Plain.parts)
"""Those of them that are no indices by themselves."""


def smallest_codec(names: Iterable[str], indices: Tensor, n: int) -> IndexCodec:
    """Of the named codecs the one that takes least for these indices; of equals the first."""
    return min((INDEX_CODECS[name] for name in names), key=lambda codec: codec.nbytes(indices, n))


def most_index_bytes(names: Iterable[str], k: int, sizes: Sequence[int]) -> int:
    """What ``k`` indices take at most in any supports together, of which each is below its size.

    Each support may be written by another of the named codecs, which only makes it smaller. Of random indices, spread
    evenly, the bound is 5 to 8 % above what they take below half of the units, and exact above.
    """
    return min(INDEX_CODECS[name].most_bytes(k, sizes) for name in names)


def codec_of(names: Iterable[str], parts: Iterable[str]) -> IndexCodec:
    """Of the named codecs the one that has written these parts.

    Raises:
        ValueError: none has; says what there is.
    """
    found = set(parts)
    for name in names:
        if set(INDEX_CODECS[name].parts) == found:
            return INDEX_CODECS[name]
    raise ValueError(f"the tensors {', '.join(sorted(found)) or '(none)'} are no encoding of indices")


def describe(tensor: Tensor) -> str:
    """A tensor's dtype and shape, for errors."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _packed(bits: numpy.ndarray) -> numpy.ndarray:
    return numpy.packbits(bits.astype(bool), bitorder="little")


def _bits(stream: Tensor) -> numpy.ndarray:
    return numpy.unpackbits(stream.cpu().numpy(), bitorder="little")


def _gaps(x: numpy.ndarray) -> numpy.ndarray:
    """How many numbers are left out before each of the increasing ``x``."""
    return numpy.diff(x, prepend=-1) - 1


def _require_bytes(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected uint8 {list(shape)}, got {describe(tensor)}")


def _require_support(x: numpy.ndarray, n: int) -> None:
    is_sorted = bool((x[1:] > x[:-1]).all())
    low, high = (x[0], x[-1]) if is_sorted and len(x) else (x.min(initial=0), x.max(initial=-1))
    if low < 0 or high >= n:
        raise ValueError(f"indices {low}..{high} do not fit the {n} units here")
    if not is_sorted:
        raise ValueError("indices are not sorted and unique")
