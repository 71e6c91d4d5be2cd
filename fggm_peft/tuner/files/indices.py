"""The indices of a layer's supports. They may exist with the right size before a loader brings their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft.tuners._buffer_dict import BufferDict

from ...core.index_codec import decode_indices
from ..target import Target, Targets
from .base_check import require_base
from .tensors import MARK, file_error

if TYPE_CHECKING:
    from ..config import FGGMConfig

T = TypeVar("T")


@dataclass(eq=False)
class AwaitedFile:
    """The file of an adapter, which a loader brings tensor by tensor. The config has its sizes until then."""

    config: FGGMConfig
    targets: Targets

    def __post_init__(self) -> None:
        self.missing = set(self.targets)
        self._is_checked = False

    def require_base(self) -> None:
        """Raise ``BaseMismatchError`` for another base, at the first call."""
        if not self._is_checked:
            require_base({path: target.layer for path, target in self.targets.items()}, self.config)
            self._is_checked = True

    def settle(self, path: str) -> None:
        """Stop waiting for the support of one module."""
        self.missing.discard(path)
        if not self.missing:
            self.config.support_sizes = self.config.index_bytes = None


@dataclass(frozen=True, eq=False)
class AwaitedSupport:
    """A support of ``k`` units that a loader will bring."""

    target: Target
    k: int
    file: AwaitedFile

    def require_whole_file(self) -> None:
        """Raise ``AdapterFileError`` if the loader brought the supports of other modules only."""
        if len(self.file.missing) < len(self.file.targets):
            raise file_error(f"{self.target.path}{MARK}indices", "this tensor is missing")


class SupportIndices(BufferDict):
    """``[k]`` indices for each adapter, in state dicts.

    transformers' own loader (``model.load_adapter``, ``AutoModel.from_pretrained``) only assigns tensors to existing
    ones of the same shape. So an adapter that is made from a saved config starts with tensors of the saved sizes. It
    counts as not ``selected`` until the loader assigns its indices, plain or encoded.
    """

    def __init__(self, selected: dict[str, bool]):
        super().__init__(persistent=True)
        self.selected = selected
        self.awaited: dict[str, AwaitedSupport] = {}

    def settle(self, name: str) -> None:
        """Stop waiting for a loader."""
        if support := self.awaited.pop(name, None):
            support.file.settle(support.target.path)

    def __delitem__(self, name: str) -> None:
        self.awaited.pop(name, None)
        super().__delitem__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.__dict__.get("awaited", {}):
            self._arrived(name)

    def _arrived(self, name: str) -> None:
        """Decode and check the tensor that a loader has assigned."""
        support, encoded = self.awaited[name], self[name]
        support.file.require_base()
        if encoded.is_meta:
            return
        try:
            indices = decode_indices(encoded, support.k, support.target.units)
        except ValueError as error:
            raise file_error(f"fggm_indices.{name}", str(error)) from error
        self.settle(name)
        self[name] = indices.to(encoded.device, support.target.layer.index_dtype)
        self.selected[name] = True


def await_supports_(config: FGGMConfig, targets: Targets) -> None:
    """Resize the supports of a saved adapter to their saved sizes, for loaders that compare shapes.

    Until a loader brings them, they are not selected. An impossible size raises ``ValueError``.
    """
    sizes, encoded = config.support_sizes or {}, config.index_bytes or {}
    file = AwaitedFile(config, {path: target for path, target in targets.items() if not target.is_selected})
    if sizes:
        for path, target in file.targets.items():
            _await_support_(target, entry_within(sizes, path) or 0, entry_within(encoded, path), file)


def _await_support_(target: Target, k: int, encoded_bytes: int | None, file: AwaitedFile) -> None:
    if not isinstance(k, int) or not 0 <= k <= target.units:
        raise ValueError(f"{target.path}: a support of {k!r} units does not fit the {target.units} of the weight")
    # a code takes at most one bit for each unit and one for each index, plus a few bytes
    is_size = encoded_bytes is None or (isinstance(encoded_bytes, int) and 0 < encoded_bytes <= target.units + 64)
    if not is_size:
        raise ValueError(f"{target.path}: {encoded_bytes!r:.80} bytes do not encode indices of {target.units} units")
    target.layer.resize_(target.adapter_name, k)
    if file.config.training_dtype is None:
        # the loader casts to the existing dtype, and float32 holds every dtype of a file
        target.values.data = target.values.data.to(torch.promote_types(target.values.dtype, torch.float32))
    indices, name = target.layer.fggm_indices, target.adapter_name
    if encoded_bytes is None:
        indices[name].fill_(-1)
    else:
        indices[name] = indices[name].new_zeros(encoded_bytes, dtype=torch.uint8)
    indices.awaited[name] = AwaitedSupport(target, k, file)


def entry_within(entries: Mapping[str, T], path: str) -> T | None:
    """The entry of a saved config for a module, or None; one path may end with the other (``AutoModel``)."""
    if path in entries:
        return entries[path]
    similar = [other for other in entries if other.endswith(f".{path}") or path.endswith(f".{other}")]
    return entries[similar[0]] if len(similar) == 1 else None
