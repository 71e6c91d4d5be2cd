"""The indices of a layer's supports, which may be there before a loader that goes by shapes brings them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor

from ..core.errors import AdapterFileError

if TYPE_CHECKING:
    from .layer import FGGMLayer


class SupportIndices(BufferDict):
    """``[k]`` indices for each adapter, in state dicts.

    PEFT resizes a layer to the file before it loads it. transformers' own loader (``model.load_adapter``,
    ``AutoModel.from_pretrained``) asks nobody: it puts a tensor in the place of one that has its shape. So an adapter
    that a saved config describes is born with room of the right size, and is without a support until the tensor comes.

    Args:
        selected: the layer's; an adapter is set to True in it when its indices have come.
    """

    def __init__(self, selected: dict[str, bool]):
        super().__init__(persistent=True)
        self.selected = selected
        self.awaited: dict[str, int] = {}  # adapter -> units that there are to choose from

    def await_(self, name: str, k: int, units: int) -> None:
        """Make room for ``k`` indices below ``units`` that a loader will bring."""
        self[name] = self[name].new_full((k,), -1)
        self.awaited[name] = units

    def settle(self, name: str) -> None:
        """Nothing is awaited any longer: the support has come from elsewhere."""
        self.awaited.pop(name, None)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("awaited", {}):
            self._arrived(name)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self.awaited):
            if prefix + name in state_dict:
                self._arrived(name)

    def _arrived(self, name: str) -> None:
        indices: Tensor = self[name]
        if not indices.is_meta and not are_legal(indices, self.awaited[name]):
            raise AdapterFileError(
                f"fggm_indices.{name}: indices are out of range, or not sorted and unique. "
                "The file was made for another base model or is damaged."
            )
        self.selected[name] = True
        self.settle(name)


def are_legal(indices: Tensor, units: int) -> bool:
    """Whether they are sorted, unique, and below ``units``."""
    if not indices.numel():
        return True
    return bool((indices[0] >= 0) & (indices[-1] < units) & (indices[1:] > indices[:-1]).all())


def await_support_(layer: FGGMLayer, adapter_name: str, k: int) -> None:
    """Make room in a layer for a support of ``k`` units that a loader will bring; until then there is none.

    Raises:
        ValueError: there are fewer units than that.
    """
    units = layer.granularity[adapter_name].units(layer.weight_shape)
    if not isinstance(k, int) or not 0 <= k <= units:
        raise ValueError(f"a support of {k!r} units does not fit the {units} that are there")
    layer.resize_(adapter_name, k)
    for parameter in layer.trained(adapter_name):  # the loader casts to what it finds, and float32 holds them all
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    layer.fggm_indices.await_(adapter_name, k, units)


def size_within(sizes: Mapping[str, int], name: str) -> int:
    """The size of a module's support, 0 if there is none.

    The model may be the body of the one that was saved (``AutoModel``), or have more around it: then one path ends
    like the other.
    """
    if name in sizes:
        return sizes[name]
    alike = [path for path in sizes if path.endswith(f".{name}") or name.endswith(f".{path}")]
    return sizes[alike[0]] if len(alike) == 1 else 0
