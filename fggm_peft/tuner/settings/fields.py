"""The two kinds of fields of ``FGGMConfig``: settings of the user, and values that the library writes."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, help_text: str) -> Any:
    """A keyword of the config."""
    return dataclasses.field(default=default, metadata={"help": help_text})


def written(help_text: str) -> Any:
    """A value that the library writes: saved and restored with the config, but not a keyword."""
    help_text = f"{help_text} Written by the library."
    return dataclasses.field(default=None, init=False, metadata={"help": help_text})


def is_integer(value: Any, least: int) -> bool:
    """Whether the value is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
