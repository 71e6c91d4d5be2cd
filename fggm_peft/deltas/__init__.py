"""What is done with finished deltas: read, verified and saved, compared, combined, taken out again, exported.

Nothing here is imported before it is used, so that importing the package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tuner.files.reading import read_adapter, read_supports
    from .apply import apply_deltas, export_merged
    from .arithmetic import compose, prune, subtract
    from .consolidation import consolidate
    from .delta import ModuleDelta, SparseDelta
    from .difference import diff
    from .ledger import Ledger
    from .overlaps import Overlap, overlap
    from .saving import save_adapter
    from .to_lora import LoraExport, export_lora, lora_ranks
    from .verification import Verification, verify

_HOMES = {
    "Ledger": ".ledger",
    "LoraExport": ".to_lora",
    "ModuleDelta": ".delta",
    "Overlap": ".overlaps",
    "SparseDelta": ".delta",
    "Verification": ".verification",
    "apply_deltas": ".apply",
    "compose": ".arithmetic",
    "consolidate": ".consolidation",
    "diff": ".difference",
    "export_lora": ".to_lora",
    "export_merged": ".apply",
    "lora_ranks": ".to_lora",
    "overlap": ".overlaps",
    "prune": ".arithmetic",
    "read_adapter": "..tuner.files.reading",
    "read_supports": "..tuner.files.reading",
    "save_adapter": ".saving",
    "subtract": ".arithmetic",
    "verify": ".verification",
}

__all__ = [
    "Ledger",
    "LoraExport",
    "ModuleDelta",
    "Overlap",
    "SparseDelta",
    "Verification",
    "apply_deltas",
    "compose",
    "consolidate",
    "diff",
    "export_lora",
    "export_merged",
    "lora_ranks",
    "overlap",
    "prune",
    "read_adapter",
    "read_supports",
    "save_adapter",
    "subtract",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
