"""Registries: each kind of variant (granularity, criterion, ...) has one, and one decorator adds to it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar

T = TypeVar("T")
D = TypeVar("D")


def require_one_of(name: str, value: Any, legal: Collection[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of the legal values of the setting ``name``."""
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


class Registry(Generic[T]):
    """Maps names to variants, in the order of registration. Looking up an unknown name raises ``ValueError``.

    Args:
        kind: what the variants are, for error messages.
        make: turns the decorated object and the options of ``register`` into the entry; by default the object itself.
        named: classes get the name that they are registered under as their attribute ``name``.
    """

    def __init__(self, kind: str, make: Callable[..., T] | None = None, named: bool = False):
        self.kind, self._make, self._named = kind, make, named
        self._entries: dict[str, T] = {}

    def register(self, name: str, **options: Any) -> Callable[[D], D]:
        """A decorator that adds a class or function under ``name``; raises ``ValueError`` if the name is taken."""
        if name in self._entries:
            raise ValueError(f"there is already a {self.kind} named {name!r}")

        def add(variant: D) -> D:
            if self._named:
                variant.name = name  # type: ignore[attr-defined]
            self._entries[name] = variant if self._make is None else self._make(variant, **options)  # type: ignore[assignment]
            return variant

        return add

    def build(self, value: Any, key: str) -> Any:
        """An instance of a registered dataclass, from its name or a dict of the name (under ``key``) and arguments.

        Raises:
            ValueError: the name or an argument is unknown, an argument is missing or its value is illegal.
        """
        arguments = dict(value) if isinstance(value, Mapping) else {key: value}
        variant: Any = self[arguments.pop(key, None)]  # type: ignore[arg-type]
        legal = sorted(f.name for f in fields(variant) if f.init)
        if unknown := sorted(set(arguments) - set(legal)):
            takes = f"it takes {', '.join(legal)}" if legal else "it takes none"
            raise ValueError(f"{variant.__name__} has no argument {unknown[0]!r}; {takes}")
        try:
            return variant(**arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind} {variant.name!r}: {error}") from error

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
