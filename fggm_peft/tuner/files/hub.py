"""Names that stand for a folder here or for an id on the Hub, and the one error for those that stand for neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id


def may_be_hub_id(name: str) -> bool:
    """Whether something on the Hub can have this name: ``./a``, ``~/a``, ``/a``, ``a/b/c`` and ``a b`` are paths."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def not_here(name: str) -> str:
    """What an error says of a name under which there is no folder."""
    where = f"there is no folder {Path(name).expanduser().absolute()}"
    return where if may_be_hub_id(name) else f"{where}, and {name!r} cannot be a Hub id (those are OWNER/NAME)"


@contextmanager
def from_hub(name: str, what: str, error_class: type[Exception]) -> Iterator[None]:
    """Download, in the body, what is in no folder here; the Hub is not asked for what cannot be one of its ids.

    Raises:
        error_class: it is not on the Hub, or the Hub cannot be reached; names the folder that is not here.
    """
    if not may_be_hub_id(name):
        raise error_class(f"no {what} {name!r}: {not_here(name)}")
    try:
        yield
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise error_class(f"no {what} {name!r}: {not_here(name)}, nor is it on the Hub: {error}") from error
