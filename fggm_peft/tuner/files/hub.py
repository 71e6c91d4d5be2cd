"""Expands paths, and distinguishes folders from Hub ids."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


def expanded(name: str) -> str:
    """The name of a path or a Hub id. ``~`` is the home directory, also where a shell does not expand it."""
    return os.path.expanduser(name)  # noqa: PTH111 (Path's raises an error for an unknown user and omits "./")


def user_path(name: str | Path) -> Path:
    """The path that a user means."""
    return Path(expanded(str(name)))


def may_be_hub_id(name: str) -> bool:
    """Whether a Hub id can have this name: ``./a``, ``~/a``, ``/a``, ``a/b/c`` and ``a b`` are paths."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def not_here(name: str) -> str:
    """The part of an error message that says that there is no folder of this name."""
    location = f"there is no folder {user_path(name).absolute()}"
    return location if may_be_hub_id(name) else f"{location}, and {name!r} cannot be a Hub id (those are OWNER/NAME)"


@contextmanager
def from_hub(name: str, what: str, error_class: type[Exception]) -> Iterator[None]:
    """Context for the download of something that is not a local folder; every failure is an ``error_class``."""
    if not may_be_hub_id(name):
        raise error_class(f"no {what} {name!r}: {not_here(name)}")
    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError) as error:
        problem = f"{not_here(name)}, and it cannot be loaded from the Hub: {error}"
        raise error_class(f"no {what} {name!r}: {problem}") from error
