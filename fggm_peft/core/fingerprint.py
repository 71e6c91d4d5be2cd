"""A base model's weights in a few numbers, which distinguish another model from the same model in another dtype.

A fingerprint has the shape of each weight ``[o, i]`` and a few entries at positions that only its name determines.
Dense weights are compared exactly, after rounding to the coarser of two dtypes; quantized weights by their distance.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import AdapterFileError

LEAST_SAMPLES = 2048
"""The smallest number of entries that are sampled of a whole model."""
SAMPLES_PER_WEIGHT = 16

_DTYPES = {
    name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
}
_TEXT = re.compile(r"(\d{1,18})x(\d{1,18})(?: (\w+)(?: (quantized))? ([A-Za-z0-9+/=]*))?", re.ASCII)


@dataclass(frozen=True)
class WeightSketch:
    """The shape of a weight and some of its entries.

    Args:
        shape: ``(o, i)``.
        samples: ``[s]``, the entries at ``sample_places``, in the weight's dtype; None if they could not be read.
        quantized: the samples were dequantized, so they are not exact.
    """

    shape: tuple[int, int]
    samples: Tensor | None = None
    quantized: bool = False

    def to_text(self) -> str:
        """``"OxI"``, or ``"OxI dtype [quantized] BASE64"`` with the samples' bytes, little-endian."""
        text = f"{self.shape[0]}x{self.shape[1]}"
        if self.samples is None:
            return text
        data = base64.b64encode(self.samples.cpu().contiguous().view(torch.uint8).numpy().tobytes()).decode()
        return " ".join([text, str(self.samples.dtype)[6:], *(["quantized"] if self.quantized else []), data])

    @classmethod
    def from_text(cls, text: str) -> WeightSketch:
        """The inverse of ``to_text``; raises ``ValueError`` for other text."""
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or (match[3] is not None and match[3] not in _DTYPES):
            raise ValueError(f"not the sketch of a weight: {text!r:.80}")
        shape = int(match[1]), int(match[2])
        if match[3] is None:
            return cls(shape)
        dtype = _DTYPES[match[3]]
        try:
            data = bytearray(base64.b64decode(match[5], validate=True))
        except binascii.Error as error:
            raise ValueError(f"not the sketch of a weight: {error}") from error
        if not data or len(data) % dtype.itemsize:
            raise ValueError(f"not the sketch of a weight: {len(data)} bytes of {match[3]}")
        return cls(shape, torch.frombuffer(data, dtype=torch.uint8).view(dtype), match[4] is not None)


def samples_per_weight(weights: int) -> int:
    """The number of entries that are sampled of each weight of a model with so many weights."""
    return max(SAMPLES_PER_WEIGHT, -(-LEAST_SAMPLES // max(1, weights)))


def sample_places(name: str, shape: tuple[int, int], count: int) -> list[int]:
    """Flat indices ``o * in + i``: the first 8 bytes of ``sha256(f"{name}/{j}")``, big-endian, modulo ``out * in``."""
    entries = shape[0] * shape[1]
    digests = (hashlib.sha256(f"{name}/{j}".encode()).digest() for j in range(count if entries else 0))
    return [int.from_bytes(digest[:8], "big") % entries for digest in digests]


def sketch_weight(name: str, weight: Tensor, count: int, quantized: bool = False) -> WeightSketch:
    """Sample ``count`` entries of a weight ``[o, i]`` of any layout on any device."""
    shape = (weight.shape[0], weight.shape[1])
    places = torch.tensor(sample_places(name, shape, count), dtype=torch.int64, device=weight.device)
    return WeightSketch(shape, weight[places // shape[1], places % shape[1]].cpu() if len(places) else None, quantized)


def exact_difference(a: WeightSketch, b: WeightSketch) -> float:
    """``|b - a| / |a|`` over the sampled entries of two dense weights; 0.0 if and only if they agree.

    They agree if they are equal after rounding to the coarser dtype. Of two dtypes of the same size, such as float16
    and bfloat16, neither is coarser; between them, the rounding errors of both are allowed.
    """
    assert a.samples is not None and b.samples is not None
    x, y = a.samples, b.samples
    coarse, other = sorted((x.dtype, y.dtype), key=lambda dtype: dtype.itemsize)
    x, y = (tensor.to(coarse).double() if coarse.itemsize < other.itemsize else tensor.double() for tensor in (x, y))
    agree = (x == y) | (x.isnan() & y.isnan())
    if coarse is not other and coarse.itemsize == other.itemsize:
        infos = torch.finfo(coarse), torch.finfo(other)
        least = max(info.smallest_normal * info.eps for info in infos)
        agree |= (x - y).abs() <= x.abs() * max(info.eps for info in infos) / 2 + least
    return 0.0 if agree.all() else max(relative_distance([(x, y)]), 1e-12)


def relative_distance(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """``|b - a| / |a|`` over all pairs together, in the Euclidean norm; infinite if an entry is not finite."""
    difference = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    ratio = (difference / max(size, 1e-300)) ** 0.5
    return ratio if ratio == ratio else float("inf")


def sketches_from(fingerprint: Mapping[str, str]) -> dict[str, WeightSketch]:
    """The sketches of a config's fingerprint; ``AdapterFileError`` names the module whose sketch is damaged."""
    if not isinstance(fingerprint, Mapping):
        raise AdapterFileError(f"a fingerprint is a dict of module -> sketch, got {fingerprint!r:.80}")
    sketches = {}
    for name, text in fingerprint.items():
        try:
            sketches[str(name)] = WeightSketch.from_text(text)
        except ValueError as error:
            raise AdapterFileError(f"base_fingerprint[{name!r}]: {error}") from error
    return sketches
