"""Encodings of the indices of a support: lossless, and close to the entropy of random indices.

``k`` sorted, unique indices below ``n`` carry ``log2 C(n, k)`` bits; as int32 they take 3 to 11 times as much. The gaps
between random indices are geometric, for which the Golomb-Rice code (Golomb 1966, Rice 1979) is within a few percent.
It is never larger than Elias-Fano or a bitmask, which is its form without low bits. Streams are uint8 tensors that
describe themselves by their shapes, given ``k``; bit ``j`` of a stream is bit ``j % 8`` of byte ``j // 8``. Each
granularity names the codecs that it may use.

Streams may come from untrusted files: ``decode`` raises ``ValueError`` unless a stream is an encoding of exactly ``k``
sorted, unique indices below ``n``, without superfluous bits, and allocates at most a small multiple of its size.
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
    """The dtype of indices below ``n``."""
    return torch.int32 if n < 2**31 else torch.int64


def entropy_bytes(k: int, n: int) -> float:
    """``log2 C(n, k)`` in bytes: the smallest average size of an encoding of ``k`` of ``n`` indices."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


class IndexCodec(ABC):
    """An encoding of sorted, unique indices as tensors."""

    name: ClassVar[str]  # set by the registry
    parts: ClassVar[tuple[str, ...]]  # the tensors' names in a file, after ``fggm_``

    @abstractmethod
    def nbytes(self, indices: Tensor, n: int) -> int:
        """The exact size of the result of ``encode``."""

    @abstractmethod
    def most_bytes(self, k: int, sizes: Sequence[int]) -> int:
        """The largest size of ``k`` indices in several supports together; ``sizes`` are their ``n``."""

    @abstractmethod
    def encode(self, indices: Tensor, n: int) -> tuple[Tensor, ...]:
        """One tensor for each of ``parts``, on the CPU, from ``[k]`` sorted, unique integers below ``n``."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor], k: int, n: int) -> Tensor:
        """The indices, ``[k]`` of ``index_dtype(n)`` on the CPU; raises ``ValueError`` if the tensors are invalid."""


INDEX_CODECS: Registry[IndexCodec] = Registry("index codec", make=lambda codec: codec(), named=True)


@INDEX_CODECS.register("plain")
class Plain(IndexCodec):
    """The indices themselves."""

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
    """The gap before each index: its low ``l`` bits unchanged, the rest in unary.

    With ``g_j = x_j - x_(j-1) - 1`` and ``x_(-1) = -1``: bit ``p`` of all gaps is plane ``p`` of ``indices_lo``,
    ``[l, ceil(k / 8)]``; ``indices_hi`` has ``g_j >> l`` zeros and a one for every gap, and ends with the byte of the
    last one. With ``l = 0`` it is the bitmask of the support.
    """

    parts = ("indices_hi", "indices_lo")

    def nbytes(self, indices, n):
        gaps = _gaps(indices.to("cpu", torch.int64).numpy())
        return self._nbytes(gaps, self._low_bits(gaps, n))

    def most_bytes(self, k, sizes):
        # One number of low bits for all supports is no better than the best for each. The gaps add up to the indices
        # that are left out, and the last byte of each stream may be nearly empty.
        total = sum(sizes)
        return min(
            (k + (total - k >> low) + low * k) // 8 + 1 + len(sizes) * (1 + low)
            for low in range((total // max(1, k)).bit_length() + 1)
        )

    def _nbytes(self, gaps: numpy.ndarray, low_bits: int) -> int:
        return _bytes(len(gaps) + int((gaps >> low_bits).sum())) + low_bits * _bytes(len(gaps))

    def _low_bits(self, gaps: numpy.ndarray, n: int) -> int:
        most = (n // max(1, len(gaps))).bit_length()  # the best is below it, far below for clustered indices
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
            raise ValueError(f"{low_bits} low bits, but indices below {n} have {n.bit_length()}")
        if low.dtype != torch.uint8 or tuple(low.shape) != (low_bits, _bytes(k)):
            raise ValueError(f"indices_lo: expected uint8 {[low_bits, _bytes(k)]}, got {describe(low)}")
        if high.dtype != torch.uint8 or high.dim() != 1:
            raise ValueError(f"indices_hi: expected a vector of uint8, got {describe(high)}")
        if not _bytes(k) <= len(high) <= _bytes(k + (n >> low_bits)):
            raise ValueError(f"indices_hi: {len(high)} bytes cannot hold {k} indices below {n}")
        ones = numpy.flatnonzero(_bits(high).view(bool))  # faster on booleans than on bytes
        if len(ones) != k or _bytes(ones[-1] + 1 if k else 0) != len(high):
            raise ValueError(f"indices_hi: {len(ones)} bits are set for {k} values, or bytes follow the last")
        # the gaps before an index add up to the zeros before its one, shifted, and the sum of the low bits
        largest = (8 * len(high) << low_bits) + (k << low_bits)
        dtype = index_dtype(largest + 1)  # int32 is half as much to read and write, if nothing can overflow
        x = torch.from_numpy(ones).to(dtype).bitwise_left_shift_(low_bits)
        if low_bits:
            x -= torch.arange(k, dtype=dtype).mul_((1 << low_bits) - 1)
            x += torch.from_numpy(self._low(low, k)).cumsum(0, dtype=dtype)
        _require_support(x.numpy(), n)
        return x.to(index_dtype(n))

    def _low(self, low: Tensor, k: int) -> numpy.ndarray:
        """The low bits of every gap, in a small dtype."""
        gaps: numpy.ndarray = numpy.zeros(k, dtype=numpy.uint8 if len(low) <= 8 else numpy.int64)
        for plane, stream in enumerate(low):
            bits = _bits(stream)
            if bits[k:].any():
                raise ValueError(f"indices_lo: a bit is set beyond the last of {k}")
            gaps |= bits[:k].astype(gaps.dtype) << gaps.dtype.type(plane)
        return gaps


INDEX_PARTS = tuple(part for name in INDEX_CODECS for part in INDEX_CODECS[name].parts)
"""All names of tensors of indices in a file, after ``fggm_``."""
ENCODED_PARTS = tuple(part for part in INDEX_PARTS if part not in Plain.parts)


def smallest_codec(names: Iterable[str], indices: Tensor, n: int) -> IndexCodec:
    """The named codec whose encoding of these indices is the smallest; the first of equals."""
    return min((INDEX_CODECS[name] for name in names), key=lambda codec: codec.nbytes(indices, n))


def most_index_bytes(names: Iterable[str], k: int, sizes: Sequence[int]) -> int:
    """The largest size of ``k`` indices in several supports together, each written by its smallest named codec.

    For random, evenly spread indices the bound is 5 to 8 % above the actual size if fewer than half of the units are
    selected, and exact otherwise.
    """
    return min(INDEX_CODECS[name].most_bytes(k, sizes) for name in names)


def codec_of(names: Iterable[str], parts: Iterable[str]) -> IndexCodec:
    """The named codec that writes these parts; raises ``ValueError`` that lists the parts if there is none."""
    given = set(parts)
    for name in names:
        if set(INDEX_CODECS[name].parts) == given:
            return INDEX_CODECS[name]
    raise ValueError(f"the tensors {', '.join(sorted(given)) or '(none)'} are no encoding of indices")


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


def _require_support(x: numpy.ndarray, n: int) -> None:
    is_sorted = bool((x[1:] > x[:-1]).all())
    low, high = (x[0], x[-1]) if is_sorted and len(x) else (x.min(initial=0), x.max(initial=-1))
    if low < 0 or high >= n:
        raise ValueError(f"indices {low}..{high} do not fit the {n} units here")
    if not is_sorted:
        raise ValueError("indices are not sorted and unique")
