"""Names of the tensors in an adapter file, and the checks that need no model, because files may come from strangers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core.errors import AdapterFileError
from ...core.granularity import Granularity, Shape
from ...core.index_codec import decode_indices, describe
from ...core.ranking import all_finite

PREFIX = "base_model.model."
"""The prefix that PEFT adds to every module path."""
BASE_PART = ".base_layer."
"""Part of the names of the base's own weights. PEFT saves resized embeddings under such names."""
MARK = ".fggm_"
"""Separates a module path from the name of its tensor."""
PARTS = ("values", "indices")
"""The names that may follow ``MARK``."""
_DELTA_KEY = re.compile(rf"(?:{re.escape(PREFIX)})?(.+){re.escape(MARK)}({'|'.join(PARTS)})")
MAX_HEADER_BYTES = 2**25
MAX_TENSORS = 2**17
_VALUE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_trained_whole(key: str) -> bool:
    """Whether a tensor that belongs to no delta replaces one of the base. PEFT also saves the base's own embeddings."""
    return BASE_PART not in key or key.endswith(".bias")


def checked_delta(
    tensors: Mapping[str, Tensor], granularity: Granularity, shape: Shape, where: str
) -> dict[str, Tensor]:
    """The decoded ``indices`` and the ``values`` of one module, from its tensors in a file.

    ``AdapterFileError`` if a tensor is missing, does not fit the weight, or is not finite; ``where`` precedes its name.
    """

    for part in PARTS:
        if part not in tensors:
            raise file_error(where + part, "this tensor is missing")
    values, key = tensors["values"], f"{where}values"
    if not granularity.supports(shape):
        raise file_error(key, f"granularity={granularity} does not fit a weight of shape {list(shape)}")
    units = granularity.units(shape)
    k = values.shape[granularity.unit_dim] if values.dim() > granularity.unit_dim else -1
    fits = tuple(values.shape) == granularity.values_shape(shape, k) and 0 <= k <= units
    if not fits or values.dtype not in _VALUE_DTYPES:
        expected = f"floating-point values {list(granularity.values_shape(shape, max(k, 0)))}"
        raise file_error(key, f"expected {expected}, got {describe(values)}, for {units} {granularity.plural}")
    if not all_finite(values):
        raise file_error(key, "a value is NaN or infinite")
    try:
        return {"indices": decode_indices(tensors["indices"], k, units), "values": values}
    except ValueError as error:
        raise file_error(f"{where}indices", str(error)) from error


def file_error(key: str, problem: str) -> AdapterFileError:
    return AdapterFileError(f"{key}: {problem}. The file was made for another base model or is damaged.")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file after a check of its header; a damaged file raises ``AdapterFileError``."""
    with file.open("rb") as stream:
        start = stream.read(8)
    length, size = int.from_bytes(start, "little"), file.stat().st_size
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise AdapterFileError(f"{file} is damaged: {size} bytes with a header of {length}")
    try:
        with safe_open(file, "pt") as tensors:
            if (count := len(tensors.keys())) > MAX_TENSORS:
                raise AdapterFileError(f"{file} is damaged: it contains {count} tensors")
            yield tensors
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error


def split_key(key: str) -> tuple[str, str] | None:
    """The module path and the part of a key in a file; None if it belongs to no delta.

    Only the end of a key decides, because modules of the base may have names such as "fggm_head".
    """
    match = _DELTA_KEY.fullmatch(key)
    return None if match is None else (match[1], match[2])


def delta_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module path -> part -> key in a file, for the keys that belong to deltas."""
    modules: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        if split := split_key(key):
            modules.setdefault(split[0], {})[split[1]] = key
    return modules


def require_readable(folder: Path) -> None:
    """Raise ``AdapterFileError`` if a folder contains an adapter file that cannot be read."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        with opened(file):
            pass
