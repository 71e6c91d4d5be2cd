"""Operations on finished deltas: read, verify, save, compare, combine, remove and export them.

Modules are imported on first use, so that importing the package stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tuner.files.reading import read_adapter
    from ..tuner.files.saving import save_adapter
    from .apply import apply_deltas, export_merged
    from .arithmetic import compose, prune, subtract
    from .delta import ModuleDelta, SparseDelta
    from .difference import diff
    from .ledger import Ledger
    from .overlaps import Overlap, overlap
    from .to_lora import export_lora
    from .verification import Verification, verify

_MODULES = {
    "..tuner.files.reading": ("read_adapter",),
    "..tuner.files.saving": ("save_adapter",),
    ".apply": ("apply_deltas", "export_merged"),
    ".arithmetic": ("compose", "prune", "subtract"),
    ".delta": ("ModuleDelta", "SparseDelta"),
    ".difference": ("diff",),
    ".ledger": ("Ledger",),
    ".overlaps": ("Overlap", "overlap"),
    ".to_lora": ("export_lora",),
    ".verification": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Ledger",
    "ModuleDelta",
    "Overlap",
    "SparseDelta",
    "Verification",
    "apply_deltas",
    "compose",
    "diff",
    "export_lora",
    "export_merged",
    "overlap",
    "prune",
    "read_adapter",
    "save_adapter",
    "subtract",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name], __name__), name)
