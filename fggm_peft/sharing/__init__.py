"""Adapters as files: reading and verifying what others have written, saving without a moment of half a file."""

from .files import read_adapter, read_supports
from .saving import save_adapter
from .verify import Verification, verify

__all__ = ["Verification", "read_adapter", "read_supports", "save_adapter", "verify"]
