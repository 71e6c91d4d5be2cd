"""The formats of ``fggm export``: each function writes a delta for software that does not know this library."""

from __future__ import annotations

from collections.abc import Callable

from .to_lora import export_lora
from .to_sparse import export_shira, export_supertuning
from .to_task_vector import export_task_vector

EXPORTS: dict[str, tuple[Callable[..., dict[str, int]], str]] = {
    "lora": (export_lora, "rank"),
    "supertuning": (export_supertuning, "entries"),
    "shira": (export_shira, "entries"),
    "task-vector": (export_task_vector, "changed entries"),
}
"""Name -> function of an adapter, an output folder and ``base=``, and what the numbers are that it returns."""
