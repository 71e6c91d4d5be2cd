"""The one way in which variants (granularities, policies, criteria) get their names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def require_one_of(name: str, value: Any, legal: Collection[Any]) -> None:
    """Raise ``ValueError`` unless the value is one of the legal ones; for what is no registry."""
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


class Registry(Generic[T]):
    """Names to variants. An unknown name is a ``ValueError`` that lists the known ones."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add ``entry`` under ``name``; a name can be taken once.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"there is already a {self.kind} named {name!r}")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            nearest = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            known = ", ".join(map(repr, self._entries))
            raise ValueError(f"unknown {self.kind} {name!r}; known are {known}.{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
