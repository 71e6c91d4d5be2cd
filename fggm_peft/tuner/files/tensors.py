"""Names of the tensors in an adapter file, and the checks that need no model.

Files may come from strangers. A file is opened only if its header has a plausible size, and ``StoredModule`` checks
every tensor of a module before anything uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...core.errors import AdapterFileError
from ...core.granularity import Granularity, Shape
from ...core.index_codec import INDEX_PARTS, codec_of, describe
from ...core.ranking import all_finite

PREFIX = "base_model.model."
"""The prefix that PEFT adds to every module path."""
BASE_PART = ".base_layer."
"""Part of the names of the base's own weights. PEFT saves resized embeddings under such names."""
MARK = ".fggm_"
"""Separates a module path from the name of its tensor."""
PARTS = ("values", *INDEX_PARTS)
"""The names that may follow ``MARK``."""
MAX_HEADER_BYTES = 2**25
MAX_TENSORS = 2**17
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}


def is_trained_whole(key: str) -> bool:
    """Whether a tensor without ``MARK`` replaces one of the base. PEFT also saves the base's own embeddings."""
    return BASE_PART not in key or key.endswith(".bias")


class StoredModule:
    """The tensors of one module in a file.

    Args:
        tensors: part -> tensor. A tensor is on the meta device if only its shape and dtype were read.
        where: precedes a part's name in errors, e.g. "model.layers.0.mlp.up_proj.fggm_".
        suffix: follows it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str, suffix: str = ""):
        self.tensors, self.where, self.suffix = dict(tensors), where, suffix

    def require(self, part: str, legal: bool, problem: str) -> None:
        """Raise ``AdapterFileError`` for one part unless it is legal."""
        if not legal:
            raise self.error(part, problem)

    def error(self, part: str, problem: str) -> AdapterFileError:
        return AdapterFileError(
            f"{self.where}{part}{self.suffix}: {problem}. The file was made for another base model or is damaged."
        )

    def support(self, granularity: Granularity, shape: Shape) -> Tensor:
        """The decoded indices: ``[k]`` integers, sorted, unique, in range, one for each unit of the values.

        The check uses only the shape and dtype of the values.

        Raises:
            AdapterFileError: a tensor is missing, or does not fit a weight of this shape.
        """
        parts = [part for part in self.tensors if part in INDEX_PARTS]
        self.require("values", "values" in self.tensors, "this tensor is missing")
        self.require("indices", bool(parts), "this tensor is missing")
        values = self.tensors["values"]
        problem = f"granularity={granularity} does not fit a weight of shape {list(shape)}"
        self.require("values", granularity.supports(shape), problem)
        units = granularity.units(shape)
        k = values.shape[granularity.unit_dim] if values.dim() > granularity.unit_dim else -1
        fits = tuple(values.shape) == granularity.values_shape(shape, k) and 0 <= k <= units
        expected = "expected floating-point values " + str(list(granularity.values_shape(shape, max(k, 0))))
        problem = f"{expected}, got {describe(values)}, for {units} {granularity.plural}"
        self.require("values", fits and values.is_floating_point(), problem)
        try:
            codec = codec_of(granularity.index_codecs, parts)
            return codec.decode([self.tensors[part] for part in codec.parts], k, units)
        except ValueError as error:
            raise self.error(parts[0], str(error)) from error

    def checked(self, granularity: Granularity, shape: Shape) -> dict[str, Tensor]:
        """The decoded ``indices`` and the ``values``, which are finite.

        Raises:
            AdapterFileError: a tensor is missing, does not fit a weight of this shape, or is not finite.
        """
        tensors = {"indices": self.support(granularity, shape), "values": self.tensors["values"]}
        self.require("values", all_finite(tensors["values"]), "a value is NaN or infinite")
        return tensors


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file after a check of its header.

    Raises:
        AdapterFileError: the file is damaged or its header is implausible. Errors inside the block are converted too.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
    length, size = int.from_bytes(start, "little"), file.stat().st_size
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise AdapterFileError(f"{file} is damaged: {size} bytes with a header of {length}")
    try:
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()
            if len(keys) > MAX_TENSORS:
                raise AdapterFileError(f"{file} is damaged: it contains {len(keys)} tensors")
            for key in keys:
                dtype = tensors.get_slice(key).get_dtype()
                if MARK in key and dtype not in _DTYPES:
                    raise AdapterFileError(f"{file}: {key} has the unknown dtype {dtype}")
            yield tensors
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error


def read_modules(tensors: Any, file: Path, only_shapes_of: tuple[str, ...] = ()) -> dict[str, StoredModule]:
    """The modules of an open file, by module path.

    Args:
        only_shapes_of: parts whose data is not read; their tensors are on the meta device.

    Raises:
        AdapterFileError: a key is unknown.
    """
    modules: dict[str, StoredModule] = {}
    for key in sorted(tensors.keys()):
        if MARK not in key:
            continue
        path, _, part = key.rpartition(MARK)
        if part not in PARTS:
            raise AdapterFileError(f"{file}: unknown key {key}")
        module = modules.setdefault(path.removeprefix(PREFIX), StoredModule({}, f"{file}: {path}{MARK}"))
        if part in only_shapes_of:
            stored = tensors.get_slice(key)
            dtype = _DTYPES[stored.get_dtype()]
            module.tensors[part] = torch.empty(stored.get_shape(), dtype=dtype, device="meta")
        else:
            module.tensors[part] = tensors.get_tensor(key)
    return modules


def require_readable(folder: Path) -> None:
    """Raise ``AdapterFileError`` if a folder contains an adapter file that cannot be read."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        with opened(file) as tensors:
            read_modules(tensors, file, only_shapes_of=PARTS)
