"""Ways of learning a stream of tasks, each usable on its own: ``make_method("fggm", density=0.3)``."""

from __future__ import annotations

from typing import Any

from ...core.registry import Registry
from .ewc import EWC
from .fggm import FGGM
from .fine_tuning import FineTuning, Frozen, MultiTask
from .lora import LoRA
from .masked_fine_tuning import MaskedFineTuning
from .method import Method
from .migu import MIGU
from .o_lora import OLoRA
from .osf import OSF
from .replay import Replay
from .shira import SHiRA

__all__ = ["METHODS", "Method", "make_method"]

METHODS: Registry[type[Method]] = Registry("method")
for _method in (
    FGGM,
    MaskedFineTuning,
    FineTuning,
    Frozen,
    MultiTask,
    Replay,
    EWC,
    MIGU,
    LoRA,
    OLoRA,
    OSF,
    SHiRA,
):
    METHODS.register(_method.name)(_method)


def make_method(name: str, **options: Any) -> Method:
    """The method registered under ``name``.

    Args:
        options: its dataclass fields; and for one that trains a PEFT adapter, the fields of the adapter's config.

    Raises:
        ValueError: there is no such method or option; the message lists the known ones. Or a value is illegal.
    """
    return METHODS[name].from_options(options)
