"""The indices of a layer's supports. They may exist with the right size before a loader brings their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ...core.errors import AdapterFileError
from ...core.granularity import Granularity
from ...core.index_codec import ENCODED_PARTS, codec_of
from ..target import Target

T = TypeVar("T")


class SupportIndices(BufferDict):
    """``[k]`` indices for each adapter, in state dicts.

    PEFT calls the tuner before it loads a file, and the layer takes the file's sizes. transformers' own loader
    (``model.load_adapter``, ``AutoModel.from_pretrained``) only assigns tensors to existing ones of the same shape. So
    an adapter that is made from a saved config starts with tensors of the saved sizes. It counts as not selected until
    the loader brings its indices, or all tensors that encode them (``EncodedPart``).

    Args:
        selected: the layer's dict; an adapter is set to True when its indices arrive.
    """

    def __init__(self, selected: dict[str, bool]):
        super().__init__(persistent=True)
        self.selected = selected
        self.awaited: dict[str, AwaitedSupport] = {}
        self.parts = {part: EncodedPart(self, part) for part in ENCODED_PARTS}

    def await_(self, name: str, k: int, support: AwaitedSupport) -> None:
        """Reserve ``k`` indices that a loader will bring."""
        empty = self[name].new_full((k,), -1)
        # a persistent buffer that the file does not contain would be reported as missing
        self.register_buffer(name, empty, persistent=not support.shapes)
        for part, shape in support.shapes.items():
            self.parts[part][name] = torch.zeros(shape, dtype=torch.uint8, device=empty.device)
        self.awaited[name] = support

    def settle(self, name: str) -> None:
        """Stop waiting for a loader: the support is known."""
        if self.awaited.pop(name, None) is not None:
            self.register_buffer(name, self[name], persistent=True)
            for part in self.parts.values():
                if name in part:
                    del part[name]

    def __delitem__(self, name: str) -> None:
        self.settle(name)
        super().__delitem__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("awaited", {}):
            self.awaited[name].check()
            self._arrived(name)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        arriving = [name for name in self.awaited if prefix + name in state_dict]
        for name in arriving:
            self.register_buffer(name, self[name], persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in arriving:
            self._arrived(name)

    def part_arrived(self, name: str, part: str) -> None:
        """Record that a tensor of encoded indices was assigned; the last one decodes them.

        Raises:
            AdapterFileError: the tensors do not encode indices of this weight.
        """
        support = self.awaited[name]
        support.check()
        support.arrived.add(part)
        tensors = {part: self.parts[part][name] for part in support.shapes}
        if support.arrived < tensors.keys() or any(tensor.is_meta for tensor in tensors.values()):
            return
        try:
            codec = codec_of(support.granularity.index_codecs, tensors)
            indices = codec.decode([tensors[part] for part in codec.parts], len(self[name]), support.units)
        except ValueError as error:
            raise _damaged(name, str(error)) from error
        self[name] = indices.to(tensors[part].device, self[name].dtype)
        self._arrived(name)

    def _arrived(self, name: str) -> None:
        indices: Tensor = self[name]
        if not indices.is_meta and not are_legal(indices, self.awaited[name].units):
            raise _damaged(name, "indices are out of range, or not sorted and unique")
        self.selected[name] = True
        self.settle(name)


def _damaged(name: str, problem: str) -> AdapterFileError:
    return AdapterFileError(f"fggm_indices.{name}: {problem}. The file was made for another base model or is damaged.")


@dataclass
class AwaitedSupport:
    """A support that a loader will bring.

    Args:
        units: number of units to choose from.
        shapes: part -> shape of the tensors that encode the indices; empty if the indices are plain.
        check: raises if the adapter was made for another base.
        arrived: the parts that the loader has brought.
    """

    granularity: Granularity
    units: int
    shapes: dict[str, tuple[int, ...]]
    check: Callable[[], None]
    arrived: set[str] = field(default_factory=set)


class EncodedPart(BufferDict):
    """One tensor of encoded indices for each adapter (uint8), while a loader may bring it."""

    def __init__(self, indices: SupportIndices, part: str):
        super().__init__(persistent=True)
        self.__dict__["indices"] = indices  # not as a submodule
        self.part = part

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self.indices.part_arrived(name, self.part)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        return  # state dicts contain decoded indices


def are_legal(indices: Tensor, units: int) -> bool:
    """Whether the indices are sorted, unique and in ``[0, units)``."""
    if not indices.numel():
        return True
    return bool((indices[0] >= 0) & (indices[-1] < units) & (indices[1:] > indices[:-1]).all())


def await_support_(
    target: Target, k: int, shapes: Mapping[str, Any] | None, check: Callable[[], None], keep_dtype: bool = False
) -> None:
    """Reserve a support of ``k`` units that a loader will bring; until then the target is not selected.

    Args:
        shapes: part -> shape of the tensors that encode the indices, from a saved config.
        check: raises if the adapter was made for another base; called when a loader assigns the first tensor.
        keep_dtype: keep the values' dtype, which the config names. Otherwise they become at least float32.

    Raises:
        ValueError: there are fewer than ``k`` units, or the shapes cannot be those of encoded indices.
    """
    if not isinstance(k, int) or not 0 <= k <= target.units:
        raise ValueError(f"{target.path}: a support of {k!r} units does not fit the {target.units} of the weight")
    legal = {part: _legal_shape(part, shape, target.units) for part, shape in (shapes or {}).items()}
    target.layer.resize_(target.adapter_name, k)
    # the loader casts to the existing dtype, and float32 holds every dtype of a file
    if not keep_dtype:
        target.values.data = target.values.data.to(torch.promote_types(target.values.dtype, torch.float32))
    support = AwaitedSupport(target.granularity, target.units, legal, check)
    target.layer.fggm_indices.await_(target.adapter_name, k, support)


def _legal_shape(part: str, shape: Any, units: int) -> tuple[int, ...]:
    """Check the shape of an encoded part, which may come from a stranger.

    A code takes at most one bit for each unit and one for each index, plus a few bytes.
    """
    sizes = shape if isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in shape) else None
    if part not in ENCODED_PARTS or sizes is None or math.prod(sizes) > units + 64:
        raise ValueError(f"{part} of shape {shape!r:.80} does not encode indices of {units} units")
    return tuple(sizes)


def entry_within(entries: Mapping[str, T], path: str) -> T | None:
    """The entry of a saved config for a module, or None.

    The model may be the body of the saved one (``AutoModel``), or contain it. Then one path ends with the other.
    """
    if path in entries:
        return entries[path]
    similar = [other for other in entries if other.endswith(f".{path}") or path.endswith(f".{other}")]
    return entries[similar[0]] if len(similar) == 1 else None
