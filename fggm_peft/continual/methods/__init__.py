"""Ways of learning a stream of tasks, each usable on its own: ``make_method("fggm", density=0.3)``."""

from __future__ import annotations

from typing import Any

from . import ewc, fggm, fine_tuning, lora, masked_fine_tuning, migu, o_lora, osf, replay, shira  # noqa: F401
from .method import METHODS, Method

__all__ = ["METHODS", "Method", "make_method"]


def make_method(name: str, **options: Any) -> Method:
    """The method registered under ``name``.

    Args:
        options: its dataclass fields; and for one that trains a PEFT adapter, the fields of the adapter's config.

    Raises:
        ValueError: there is no such method or option; the message lists the known ones. Or a value is illegal.
    """
    return METHODS[name].from_options(options)
