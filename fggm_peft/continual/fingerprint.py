"""Fingerprints of streams as plain types, and what differs between two of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """The value as JSON gives it back, with 1.0 as 1: a file and Python may write the same number differently."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints: "training.epochs: 1, there 3"; empty if and only if they are equal."""
    here, there = _flat(mine), _flat(theirs)
    names = [*here, *(name for name in there if name not in here)]
    pairs = [(name, here.get(name, "nothing"), there.get(name, "nothing")) for name in names]
    return [f"{name}: {_shown(a)}, there {_shown(b)}" for name, a, b in pairs if a != b]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted names to values as JSON, in which 1 and true are not the same."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: json.dumps(value, ensure_ascii=False)}
    below = (_flat(entry, f"{prefix}.{key}" if prefix else str(key)) for key, entry in value.items())
    return {name: text for part in below for name, text in part.items()}


def _shown(text: str) -> str:
    return f"content {text[1:9]}" if re.fullmatch(r'"[0-9a-f]{64}"', text) else text
