"""The tensors of an adapter file: how they are called, and the checks that need no model.

Files come from strangers. A safetensors file is opened only if its header is of a reasonable size; of a module's
tensors nothing is believed before ``StoredModule`` has looked at it.
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
from ...core.finite import all_finite
from ...core.granularity import Granularity, Shape
from ...core.index_codec import INDEX_PARTS, codec_of, describe

PREFIX = "base_model.model."
"""What PEFT puts before the path of a module."""
BASE_PART = ".base_layer."
"""In the names of the base's own weights: PEFT saves an embedding with its adapter, for it may have been resized."""
MARK = ".fggm_"
PARTS = ("values", "bias", *INDEX_PARTS)
"""What may follow ``MARK`` in the key of a tensor of ours."""
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


class StoredModule:
    """The tensors of one module in a file, and the names that errors give them.

    Args:
        tensors: part -> tensor; on the meta device where only shape and dtype have been read.
        where: goes before the parts in errors, e.g. "model.layers.0.mlp.up_proj.fggm_".
        suffix: goes behind them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str, suffix: str = ""):
        self.tensors, self.where, self.suffix = dict(tensors), where, suffix

    def require(self, part: str, legal: bool, problem: str) -> None:
        if not legal:
            raise self.error(part, problem)

    def error(self, part: str, problem: str) -> AdapterFileError:
        return AdapterFileError(
            f"{self.where}{part}{self.suffix}: {problem}. The file was made for another base model or is damaged."
        )

    def support(self, granularity: Granularity, shape: Shape) -> Tensor:
        """The indices, decoded: ``[k]`` integers, sorted, unique, in range, as many as there are values.

        Values are looked at for their shape and dtype alone.

        Raises:
            AdapterFileError: a tensor is missing, or does not fit a weight of this shape.
        """
        parts = [part for part in self.tensors if part in INDEX_PARTS]
        self.require("values", "values" in self.tensors, "this tensor is missing")
        self.require("indices", bool(parts), "this tensor is missing")
        values = self.tensors["values"]
        k = values.shape[granularity.unit_dim] if values.dim() > granularity.unit_dim else -1
        fits = granularity.supports(shape)
        self.require("values", fits, f"granularity={granularity} does not fit a weight of shape {list(shape)}")
        n = granularity.units(shape)
        expected = granularity.values_shape(shape, k)
        fits = values.is_floating_point() and tuple(values.shape) == expected and 0 <= k <= n
        wanted = "expected floating-point values " + str(list(granularity.values_shape(shape, max(k, 0))))
        self.require("values", fits, f"{wanted}, got {describe(values)}, for {n} {granularity.name}s")
        try:
            codec = codec_of(granularity.index_codecs, parts)
            return codec.decode([self.tensors[part] for part in codec.parts], k, n)
        except ValueError as error:
            raise self.error(parts[0], str(error)) from error

    def checked(self, granularity: Granularity, shape: Shape) -> dict[str, Tensor]:
        """``indices``, decoded, ``values`` and, if there are some, ``bias`` ``[k]``, all finite.

        Raises:
            AdapterFileError: a tensor is missing, does not fit a weight of this shape, or is not finite.
        """
        found = {"indices": self.support(granularity, shape), "values": self.tensors["values"]}
        k = len(found["indices"])
        if (bias := self.tensors.get("bias")) is not None:
            fits = bias.is_floating_point() and tuple(bias.shape) == (k,)
            self.require("bias", fits, f"expected floating-point values [{k}], got {describe(bias)}")
            found["bias"] = bias
        for part in ("values", "bias"):
            tensor = found.get(part)
            legal = tensor is None or tensor.is_meta or all_finite(tensor)
            self.require(part, legal, "a value is NaN or infinite")
        return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, its header checked.

    Raises:
        AdapterFileError: it is damaged, or its header is out of all proportion; also for what the block reads of it.
    """
    require_header(file)
    try:
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()
            if len(keys) > MAX_TENSORS:
                raise AdapterFileError(f"{file} is damaged: it holds {len(keys)} tensors")
            for key in keys:
                kind = tensors.get_slice(key).get_dtype()
                if MARK in key and kind not in _DTYPES:
                    raise AdapterFileError(f"{file}: {key} is of the unknown dtype {kind}")
            yield tensors
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is damaged: {error}") from error


def require_header(file: Path) -> None:
    """Raise ``AdapterFileError`` if the length of a safetensors file's header is impossible."""
    with file.open("rb") as stream:
        start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
        raise AdapterFileError(f"{file} is damaged: {file.stat().st_size} bytes with a header of {length}")


def read_modules(tensors: Any, file: Path, unread: tuple[str, ...] = ()) -> dict[str, StoredModule]:
    """The modules of an opened file, by module path.

    Args:
        unread: parts of which only shape and dtype are taken; their tensors are on the meta device.

    Raises:
        AdapterFileError: a key is none that an adapter has.
    """
    modules: dict[str, StoredModule] = {}
    for key in sorted(tensors.keys()):
        if MARK not in key:
            continue
        path, _, part = key.rpartition(MARK)
        if part not in PARTS:
            raise AdapterFileError(f"{file}: unknown key {key}")
        module = modules.setdefault(path.removeprefix(PREFIX), StoredModule({}, f"{file}: {path}{MARK}"))
        module.tensors[part] = _unread(tensors, key) if part in unread else tensors.get_tensor(key)
    return modules


def _unread(tensors: Any, key: str) -> Tensor:
    """A tensor of a file by its shape and dtype alone."""
    part = tensors.get_slice(key)
    return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")


def require_readable(folder: Path) -> None:
    """Raise ``AdapterFileError`` if a folder holds an adapter file that cannot be read; it need not hold one."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        with opened(file) as tensors:
            read_modules(tensors, file, unread=PARTS)
