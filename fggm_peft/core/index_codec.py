"""How the indices of a support are written to a file: lossless, and near the entropy where they are many.

``k`` sorted, unique indices below ``n`` carry ``log2 C(n, k)`` bits. As int32 they take 3 to 11 times as much; the
smaller of Elias-Fano and a bitmask takes at most 1.09 times up to 5 % density and 1.22 times at worst. Streams are
plain uint8 tensors that describe themselves by their shapes, given ``k`` and ``n``; bit ``j`` of a stream is bit
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

import numpy  # torch has no packbits, and its own operators decode ten times slower
import torch
from torch import Tensor

from .registry import Registry


def index_dtype(n: int) -> torch.dtype:
    """What indices below ``n`` are kept as."""
    return torch.int32 if n <= 2**31 else torch.int64


def entropy_bytes(k: int, n: int) -> float:
    """``log2 C(n, k)`` in bytes: what ``k`` of ``n`` cannot be written in less than, on the average."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


class IndexCodec(ABC):
    """One way to write sorted, unique indices as tensors."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    """What the tensors are called in a file, after ``fggm_``."""

    @abstractmethod
    def nbytes(self, k: int, n: int) -> int:
        """The exact size of ``k`` of ``n``."""

    @abstractmethod
    def encode(self, indices: Tensor, n: int) -> tuple[Tensor, ...]:
        """One tensor for each of ``parts``, on the CPU, from ``[k]`` sorted, unique integers below ``n``."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor], k: int, n: int) -> Tensor:
        """The indices, ``[k]`` of ``index_dtype(n)`` on the CPU.

        Raises:
            ValueError: the tensors are no encoding of ``k`` of ``n``.
        """


class Plain(IndexCodec):
    """The indices as they are."""

    name = "plain"
    parts = ("indices",)

    def nbytes(self, k, n):
        return k * index_dtype(n).itemsize

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


class EliasFano(IndexCodec):
    """Elias-Fano code (Elias 1974, Fano 1971): the low ``l`` bits of each index as they are, the rest in unary.

    ``indices_lo`` ``[l, ceil(k / 8)]``: plane ``p`` holds bit ``p`` of every index. ``indices_hi``
    ``[ceil((k + ((n - 1) >> l)) / 8)]``: bit ``(x_j >> l) + j`` is set for the ``j``-th index ``x_j``.
    """

    name = "elias_fano"
    parts = ("indices_hi", "indices_lo")

    def nbytes(self, k, n):
        return self._nbytes(k, n, self._low_bits(k, n))

    def _nbytes(self, k: int, n: int, low_bits: int) -> int:
        return _bytes(k + ((n - 1) >> low_bits)) + low_bits * _bytes(k)

    def _low_bits(self, k: int, n: int) -> int:
        return min(range((n - 1).bit_length() + 1), key=lambda low_bits: self._nbytes(k, n, low_bits))

    def encode(self, indices, n):
        x = indices.to("cpu", torch.int64).numpy()
        low_bits = self._low_bits(len(x), n)
        unary = numpy.zeros(len(x) + ((n - 1) >> low_bits), dtype=bool)
        unary[(x >> low_bits) + numpy.arange(len(x))] = True
        low = numpy.empty((low_bits, _bytes(len(x))), dtype=numpy.uint8)
        for plane in range(low_bits):
            low[plane] = _packed((x >> plane) & 1)
        return torch.from_numpy(_packed(unary)), torch.from_numpy(low)

    def decode(self, tensors, k, n):
        high, low = tensors
        low_bits = len(low) if low.dim() == 2 else 0
        if low_bits > (n - 1).bit_length():
            raise ValueError(f"{low_bits} low bits, and indices below {n} have {(n - 1).bit_length()}")
        high_bits = k + ((n - 1) >> low_bits)
        _require_bytes("indices_lo", low, (low_bits, _bytes(k)))
        _require_bytes("indices_hi", high, (_bytes(high_bits),))
        x = _ones("indices_hi", high, high_bits, k)
        x -= numpy.arange(k)
        x <<= low_bits
        for plane, stream in enumerate(low):
            x |= _bits("indices_lo", stream, k).astype(numpy.int64) << plane
        _require_support(x, n)
        return torch.from_numpy(x).to(index_dtype(n))


class Bitmask(IndexCodec):
    """One bit for each of the ``n``: ``indices_mask`` ``[ceil(n / 8)]``."""

    name = "bitmask"
    parts = ("indices_mask",)

    def nbytes(self, k, n):
        return _bytes(n)

    def encode(self, indices, n):
        mask = numpy.zeros(n, dtype=bool)
        mask[indices.cpu().numpy()] = True
        return (torch.from_numpy(_packed(mask)),)

    def decode(self, tensors, k, n):
        (mask,) = tensors
        _require_bytes("indices_mask", mask, (_bytes(n),))
        return torch.from_numpy(_ones("indices_mask", mask, n, k)).to(index_dtype(n))


INDEX_CODECS: Registry[IndexCodec] = Registry("index codec")
for _codec in (Plain(), EliasFano(), Bitmask()):
    INDEX_CODECS.register(_codec.name, _codec)

INDEX_PARTS = tuple(part for name in INDEX_CODECS for part in INDEX_CODECS[name].parts)
"""Every name that a tensor of indices may have in a file, after ``fggm_``."""


def smallest_codec(names: Iterable[str], k: int, n: int) -> IndexCodec:
    """Of the named codecs the one that takes least; of equals the first."""
    return min((INDEX_CODECS[name] for name in names), key=lambda codec: codec.nbytes(k, n))


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


def _bits(name: str, stream: Tensor, count: int) -> numpy.ndarray:
    bits = numpy.unpackbits(stream.cpu().numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError(f"{name}: a bit is set beyond the last of {count}")
    return bits[:count]


def _ones(name: str, stream: Tensor, count: int, k: int) -> numpy.ndarray:
    """Where the first ``count`` bits are set, which must be in ``k`` places."""
    ones = numpy.flatnonzero(_bits(name, stream, count))
    if len(ones) != k:
        raise ValueError(f"{name}: {len(ones)} bits are set for {k} values")
    return ones.astype(numpy.int64, copy=False)


def _require_bytes(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected uint8 {list(shape)}, got {describe(tensor)}")


def _require_support(x: numpy.ndarray, n: int) -> None:
    if len(x) and (x.min() < 0 or x.max() >= n):
        raise ValueError(f"indices {x.min()}..{x.max()} do not fit the {n} units here")
    if not (x[1:] > x[:-1]).all():
        raise ValueError("indices are not sorted and unique")
