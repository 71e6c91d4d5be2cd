"""Operations on finished deltas: read, verify, save, compare, combine, remove and export them.

Modules are imported on first use, so that importing the package stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tuner.files.saving import save_adapter
    from .apply import apply_deltas
    from .arithmetic import compose, prune
    from .delta import ModuleDelta, SparseDelta
    from .difference import diff
    from .ledger import Ledger
    from .overlaps import Overlap, overlap
    from .to_lora import export_lora
    from .to_sparse import export_shira, export_supertuning
    from .to_task_vector import export_task_vector
    from .verification import verify

_MODULES = ["..tuner.files.saving", ".delta", ".arithmetic", ".apply", ".difference", ".ledger", ".overlaps"]
_MODULES += [".exports", ".verification"]

__all__ = [
    "Ledger",
    "ModuleDelta",
    "Overlap",
    "SparseDelta",
    "apply_deltas",
    "compose",
    "diff",
    "export_lora",
    "export_shira",
    "export_supertuning",
    "export_task_vector",
    "overlap",
    "prune",
    "save_adapter",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            if hasattr(loaded := import_module(module, __name__), name):
                return getattr(loaded, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
