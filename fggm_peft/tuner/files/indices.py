"""The indices of a layer's supports, which may be there before a loader that goes by shapes brings them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ...core.errors import AdapterFileError
from ...core.granularity import Granularity
from ...core.index_codec import ENCODED_PARTS, codec_of

if TYPE_CHECKING:
    from ..layer import FGGMLayer

T = TypeVar("T")


class SupportIndices(BufferDict):
    """``[k]`` indices for each adapter, in state dicts.

    PEFT resizes a layer to the file before it loads it. transformers' own loader (``model.load_adapter``,
    ``AutoModel.from_pretrained``) asks nobody: it puts a tensor in the place of one that has its shape. So an adapter
    that a saved config describes is born with room of the right size, and is without a support until the tensors come:
    the indices, or those that encode them, for which there is a place beside (``AwaitedPart``) until they are decoded.

    Args:
        selected: the layer's; an adapter is set to True in it when its indices have come.
    """

    def __init__(self, selected: dict[str, bool]):
        super().__init__(persistent=True)
        self.selected = selected
        self.awaited: dict[str, Awaited] = {}
        self.parts = {part: AwaitedPart(self, part) for part in ENCODED_PARTS}

    def await_(self, name: str, k: int, what: Awaited) -> None:
        """Make room for ``k`` indices that a loader will bring."""
        empty = self[name].new_full((k,), -1)
        # a place that nothing is put in would be reported as missing
        self.register_buffer(name, empty, persistent=not what.shapes)
        for part, shape in what.shapes.items():
            self.parts[part][name] = torch.zeros(shape, dtype=torch.uint8, device=empty.device)
        self.awaited[name] = what

    def settle(self, name: str) -> None:
        """Nothing is awaited any longer: the support has come from elsewhere."""
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
        here = [name for name in self.awaited if prefix + name in state_dict]
        for name in here:
            self.register_buffer(name, self[name], persistent=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in here:
            self._arrived(name)

    def part_arrived(self, name: str, part: str) -> None:
        """One of the tensors that encode the indices has come; with the last of them they are decoded.

        Raises:
            AdapterFileError: they are no indices of this weight.
        """
        what = self.awaited[name]
        what.check()
        what.come.add(part)
        tensors = {part: self.parts[part][name] for part in what.shapes}
        if what.come < tensors.keys() or any(tensor.is_meta for tensor in tensors.values()):
            return
        try:
            codec = codec_of(what.granularity.index_codecs, tensors)
            indices = codec.decode([tensors[part] for part in codec.parts], len(self[name]), what.units)
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
class Awaited:
    """What a loader is to bring of one support.

    Args:
        granularity: of the support.
        units: there are to choose from.
        shapes: part -> shape, of the tensors that encode the indices; empty where they come as they are.
        check: raises if the adapter was made for another base.
        come: the parts that have come.
    """

    granularity: Granularity
    units: int
    shapes: dict[str, tuple[int, ...]]
    check: Callable[[], None]
    come: set[str] = field(default_factory=set)


class AwaitedPart(BufferDict):
    """The places of one part of encoded indices, while a loader may bring it: adapter -> uint8."""

    def __init__(self, indices: SupportIndices, part: str):
        super().__init__(persistent=True)
        self.__dict__["indices"] = indices  # not as a module within this one
        self.part = part

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._buffers:
            self.indices.part_arrived(name, self.part)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        return  # whoever loads state dicts has decoded indices


def are_legal(indices: Tensor, units: int) -> bool:
    """Whether they are sorted, unique, and below ``units``."""
    if not indices.numel():
        return True
    return bool((indices[0] >= 0) & (indices[-1] < units) & (indices[1:] > indices[:-1]).all())


def await_support_(
    layer: FGGMLayer,
    adapter_name: str,
    k: int,
    shapes: Mapping[str, Any] | None,
    check: Callable[[], None],
    keep_dtype: bool = False,
) -> None:
    """Make room in a layer for a support of ``k`` units that a loader will bring; until then there is none.

    Args:
        shapes: part -> shape, of the tensors that will bring it encoded.
        check: raises if the adapter was made for another base; called when they come from a loader that does not ask.
        keep_dtype: the values have the dtype that the config names; else they get one that holds whatever comes.

    Raises:
        ValueError: there are fewer units than that, or the shapes are none of encoded indices.
    """
    granularity = layer.granularity[adapter_name]
    units = granularity.units(layer.weight_shape)
    if not isinstance(k, int) or not 0 <= k <= units:
        raise ValueError(f"a support of {k!r} units does not fit the {units} that are there")
    legal = {part: _legal(part, shape, units) for part, shape in (shapes or {}).items()}
    what = Awaited(granularity, units, legal, check)
    layer.resize_(adapter_name, k)
    # the loader casts to what it finds, and float32 holds them all
    for parameter in [] if keep_dtype else layer.trained(adapter_name):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    layer.fggm_indices.await_(adapter_name, k, what)


def _legal(part: str, shape: Any, units: int) -> tuple[int, ...]:
    """The shape of a part, which a stranger has written.

    No code is longer than a bit for each unit and one for each index, but where there are few of either.
    """
    sizes = shape if isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in shape) else None
    if part not in ENCODED_PARTS or sizes is None or math.prod(sizes) > units + 64:
        raise ValueError(f"{part} of shape {shape!r:.80} does not encode indices of {units} units")
    return tuple(sizes)


def entry_within(entries: Mapping[str, T], name: str) -> T | None:
    """What a saved config says of a module, None if nothing.

    The model may be the body of the one that was saved (``AutoModel``), or have more around it: then one path ends
    like the other.
    """
    if name in entries:
        return entries[name]
    alike = [path for path in entries if path.endswith(f".{name}") or name.endswith(f".{path}")]
    return entries[alike[0]] if len(alike) == 1 else None
