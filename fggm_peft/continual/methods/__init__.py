"""Methods that learn a stream of tasks. Each can be used on its own: ``make_method("fggm", density=0.3)``."""

from __future__ import annotations

from typing import Any

from . import ewc, fggm, fine_tuning, lora, masked_fine_tuning, migu, o_lora, osf, replay, shira  # noqa: F401
from .method import METHODS, Method
from .peft_method import PeftMethod

__all__ = ["METHODS", "Method", "PeftMethod", "make_method"]


def make_method(name: str, **options: Any) -> Method:
    """The method registered under ``name``.

    Args:
        options: its dataclass fields; for a method that trains a PEFT adapter, also the fields of the adapter's config.

    Raises:
        ValueError: the method or an option is unknown (the message lists the legal ones), or a value is illegal.
    """
    return METHODS[name].from_options(options)
