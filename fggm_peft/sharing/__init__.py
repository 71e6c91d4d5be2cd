"""Adapters as files that others have written: reading, verifying."""

from .files import read_adapter, read_supports

__all__ = ["read_adapter", "read_supports"]
