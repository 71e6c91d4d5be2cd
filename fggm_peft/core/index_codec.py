"""The encoding of the indices of a support: lossless, and close to the entropy of random indices.

``k`` sorted, unique indices below ``n`` carry ``log2 C(n, k)`` bits; as int32 they take 3 to 11 times as much. The gaps
between random indices are geometric, for which the Golomb-Rice code (Golomb 1966, Rice 1979) is within a few percent.
It is never larger than Elias-Fano or a bitmask, which is its form without low bits. Codes are uint8 vectors; bit ``j``
of a stream is bit ``j % 8`` of byte ``j // 8``.

With ``g_j = x_j - x_(j-1) - 1`` and ``x_(-1) = -1``, a code consists of: one byte, the number ``l`` of low bits; ``l``
planes of ``ceil(k / 8)`` bytes, plane ``p`` with bit ``p`` of all gaps; and a stream with ``g_j >> l`` zeros and a one
for every gap, which ends with the byte of the last one.

Codes may come from untrusted files: ``decode_indices`` raises ``ValueError`` unless a code is that of exactly ``k``
sorted, unique indices below ``n``, without superfluous bits, and allocates at most a small multiple of its size.
"""

from __future__ import annotations

import math

import numpy  # torch has no packbits, and finds set bits seven times slower
import torch
from torch import Tensor


def index_dtype(n: int) -> torch.dtype:
    """The dtype of indices below ``n``."""
    return torch.int32 if n < 2**31 else torch.int64


def entropy_bytes(k: int, n: int) -> float:
    """``log2 C(n, k)`` in bytes: the smallest average size of an encoding of ``k`` of ``n`` indices."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8


def encode_indices(indices: Tensor, n: int, compress: bool) -> Tensor:
    """``k`` sorted, unique integers below ``n`` as a vector on the CPU: a code if that is smaller, or the indices."""
    plain = indices.to("cpu", index_dtype(n))
    if not compress:
        return plain
    x = plain.numpy()
    gaps: numpy.ndarray = numpy.diff(x.astype(numpy.int64), prepend=-1) - 1
    most = (n // max(1, len(gaps))).bit_length()  # the best is below it, far below for clustered indices
    low_bits = min(range(most + 1), key=lambda low_bits: _code_bytes(gaps, low_bits))
    if _code_bytes(gaps, low_bits) >= plain.nbytes:
        return plain
    ones = ((gaps >> low_bits) + 1).cumsum() - 1
    unary = numpy.zeros(ones[-1] + 1, dtype=bool)
    unary[ones] = True
    planes = [(gaps >> plane) & 1 for plane in range(low_bits)]
    streams = [numpy.packbits(bits.astype(bool), bitorder="little") for bits in (*planes, unary)]
    return torch.from_numpy(numpy.concatenate([numpy.array([low_bits], dtype=numpy.uint8), *streams]))


def decode_indices(encoded: Tensor, k: int, n: int) -> Tensor:
    """The inverse of ``encode_indices``: ``[k]`` of ``index_dtype(n)`` on the CPU.

    Raises:
        ValueError: the tensor is not that of ``k`` sorted, unique indices below ``n``.
    """
    if encoded.dim() != 1 or encoded.dtype not in (torch.int32, torch.int64, torch.uint8):
        raise ValueError(f"expected a vector of int32, int64 or uint8, got {describe(encoded)}")
    if encoded.dtype == torch.uint8:
        indices = _decode(encoded.cpu().numpy(), k, n)
    elif len(encoded) == k:
        indices = encoded.cpu()
    else:
        raise ValueError(f"{len(encoded)} indices for {k} values")
    x = indices.numpy()
    is_sorted = bool((x[1:] > x[:-1]).all())
    low, high = (x[0], x[-1]) if is_sorted and len(x) else (x.min(initial=0), x.max(initial=-1))
    if low < 0 or high >= n:
        raise ValueError(f"indices {low}..{high} do not fit the {n} units here")
    if not is_sorted:
        raise ValueError("indices are not sorted and unique")
    return indices.to(index_dtype(n))


def describe(tensor: Tensor) -> str:
    """A tensor's dtype and shape, for errors."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _decode(code: numpy.ndarray, k: int, n: int) -> Tensor:
    """Indices that may still be unsorted or too large."""
    low_bits = int(code[0]) if len(code) else 0
    if low_bits > n.bit_length():
        raise ValueError(f"{low_bits} low bits, but indices below {n} have {n.bit_length()}")
    width = _bytes(k)
    high = code[1 + low_bits * width :]
    if k == 0 or not width <= len(high) <= _bytes(k + (n >> low_bits)):
        raise ValueError(f"a code of {len(code)} bytes cannot hold {k} indices below {n}")
    low = code[1 : 1 + low_bits * width].reshape(low_bits, width)
    ones = numpy.flatnonzero(_bits(high).view(bool))  # faster on booleans than on bytes
    if len(ones) != k or _bytes(ones[-1] + 1) != len(high):
        raise ValueError(f"{len(ones)} bits are set for {k} values, or bytes follow the last")
    # the gaps before an index add up to the zeros before its one, shifted, and the sum of the low bits
    largest = (8 * len(high) << low_bits) + (k << low_bits)
    dtype = index_dtype(largest + 1)  # int32 is half as much to read and write, if nothing can overflow
    x = torch.from_numpy(ones).to(dtype).bitwise_left_shift_(low_bits)
    if low_bits:
        x -= torch.arange(k, dtype=dtype).mul_((1 << low_bits) - 1)
        x += torch.from_numpy(_low_parts(low, k)).cumsum(0, dtype=dtype)
    return x


def _low_parts(low: numpy.ndarray, k: int) -> numpy.ndarray:
    """The low bits of every gap, in a small dtype."""
    gaps: numpy.ndarray = numpy.zeros(k, dtype=numpy.uint8 if len(low) <= 8 else numpy.int64)
    for plane, stream in enumerate(low):
        bits = _bits(stream)
        if bits[k:].any():
            raise ValueError(f"a low bit is set beyond the last of {k}")
        gaps |= bits[:k].astype(gaps.dtype, copy=False) << gaps.dtype.type(plane)
    return gaps


def _code_bytes(gaps: numpy.ndarray, low_bits: int) -> int:
    return 1 + _bytes(len(gaps) + int((gaps >> low_bits).sum())) + low_bits * _bytes(len(gaps))


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _bits(stream: numpy.ndarray) -> numpy.ndarray:
    return numpy.unpackbits(stream, bitorder="little")
