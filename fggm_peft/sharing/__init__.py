"""What is done with finished deltas: compared, combined, taken out again, exported.

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
    from .ledger import Ledger
    from .lora import LoraExport, export_lora, lora_ranks
    from .merged import apply_deltas, export_merged
    from .overlaps import Overlap, overlap

_HOMES = {
    "Ledger": "ledger",
    "LoraExport": "lora",
    "ModuleDelta": "delta",
    "Overlap": "overlaps",
    "SparseDelta": "delta",
    "apply_deltas": "merged",
    "compose": "composition",
    "consolidate": "consolidation",
    "diff": "difference",
    "export_lora": "lora",
    "export_merged": "merged",
    "lora_ranks": "lora",
    "overlap": "overlaps",
    "prune": "composition",
    "subtract": "composition",
}

__all__ = [
    "Ledger",
    "LoraExport",
    "ModuleDelta",
    "Overlap",
    "SparseDelta",
    "apply_deltas",
    "compose",
    "consolidate",
    "diff",
    "export_lora",
    "export_merged",
    "lora_ranks",
    "overlap",
    "prune",
    "subtract",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
