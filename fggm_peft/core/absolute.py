"""A delta as the new values of the entries that it touches, in the weight's own dtype: lossless at 16 bits.

A delta rounded to 16 bits gives another merged value for some entries; the merged values themselves are 16 bits wide.
They mean something on that very base only, so a digest of its touched entries goes with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from .granularity import Granularity

DIGEST_BYTES = 8


def digest_of(entries: Tensor) -> Tensor:
    """The first 8 bytes of the SHA-256 of the entries' dtype and bytes, as uint8 ``[8]``."""
    plain = entries.detach().cpu().contiguous()
    digest = hashlib.sha256(str(plain.dtype)[6:].encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()[:DIGEST_BYTES]), dtype=torch.uint8)


def absolute_values(granularity: Granularity, weight: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What merging makes of the chosen entries of ``weight`` ``[o, i]``, and the digest of what they are now.

    Raises:
        ValueError: no delta in float32 leads to these values, so they could not be loaded.
    """
    new = granularity.added(weight, indices, values, 1.0)
    digest = digest_of(granularity.gather(weight, indices))
    delta_values(granularity, weight, indices, new, digest)
    return new, digest


def delta_values(granularity: Granularity, weight: Tensor, indices: Tensor, new: Tensor, digest: Tensor) -> Tensor:
    """A delta, in float32 or wider, that merging into ``weight`` turns into exactly ``new``.

    Raises:
        ValueError: ``weight`` is not what the new values were made on.
    """
    old = granularity.gather(weight, indices)
    if new.dtype != weight.dtype:
        raise ValueError(f"new values in {_name(new)} need a base in {_name(new)}, and this one is {_name(weight)}")
    if not torch.equal(digest_of(old), digest.cpu()):
        raise ValueError("the base's entries are not those that these new values were made of")
    wide = torch.promote_types(weight.dtype, torch.float32)
    old, values = old.to(wide), new.to(wide) - old.to(wide)
    values, missed = reaching(values, lambda other: _leads_to(old, other, new))
    if missed.any():
        raise ValueError(f"no delta in {_name(values)} leads to these values")
    return values


def reaching(values: Tensor, leads: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Differences, each replaced by a neighbour where its own rounding has made it miss what it should lead to.

    Args:
        leads: values -> where they lead to what they should, booleans of the same shape.

    Returns:
        The values, and where neither they nor a neighbour do.
    """
    missed = ~leads(values)
    if missed.any():
        infinity = torch.full_like(values, torch.inf)
        for other in (values.nextafter(infinity), values.nextafter(-infinity), values.abs().neg()):
            values = torch.where(missed & leads(other), other, values)
        missed = ~leads(values)
    return values, missed


def _leads_to(old: Tensor, values: Tensor, new: Tensor) -> Tensor:
    sums = (old + values).to(new.dtype)
    return (sums == new) & (sums.signbit() == new.signbit())


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
