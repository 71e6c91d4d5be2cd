"""What is done with finished deltas: read, verified and saved, compared, combined, taken out again, exported.

Nothing here is imported before it is used, so that importing the package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .composition import compose, prune, subtract
    from .consolidation import consolidate
    from .delta import ModuleDelta, SparseDelta
    from .difference import diff
    from .files import read_adapter, read_supports
    from .ledger import Ledger
    from .lora import LoraExport, export_lora, lora_ranks
    from .merged import apply_deltas, export_merged
    from .overlaps import Overlap, overlap
    from .saving import save_adapter
    from .verification import Verification, verify

_HOMES = {
    "Ledger": "ledger",
    "LoraExport": "lora",
    "ModuleDelta": "delta",
    "Overlap": "overlaps",
    "SparseDelta": "delta",
    "Verification": "verification",
    "apply_deltas": "merged",
    "compose": "composition",
    "consolidate": "consolidation",
    "diff": "difference",
    "export_lora": "lora",
    "export_merged": "merged",
    "lora_ranks": "lora",
    "overlap": "overlaps",
    "prune": "composition",
    "read_adapter": "files",
    "read_supports": "files",
    "save_adapter": "saving",
    "subtract": "composition",
    "verify": "verification",
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
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
