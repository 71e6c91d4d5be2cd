"""What the config says of the file: legal values, the version of the format, densities in few words."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...core.errors import AdapterFileError
from ...core.fingerprint import sketches_from
from ...core.registry import require_one_of
from ...version import __version__

if TYPE_CHECKING:
    from ..config import FGGMConfig

FORMAT = 1
"""Files that say nothing are older: plain indices, no fingerprint."""

DELTA_DTYPES = (None, "float32", "bfloat16", "float16")


def require_file_settings(config: FGGMConfig) -> None:
    """Raise unless what the config says of the file is legal, and of a version that is known here.

    Raises:
        AdapterFileError: a newer version of the library has written it, or what the library writes is damaged.
        ValueError: a setting is out of its range.
    """
    version = config.fggm_format
    if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 1):
        raise AdapterFileError(f"fggm_format must be a number of a version, got {version!r}")
    if version is not None and version > FORMAT:
        made = (config.made_with or {}).get("fggm_peft", "a later version")
        raise AdapterFileError(
            f"this adapter has the file format {version}, and fggm_peft {__version__} knows formats up to {FORMAT}. "
            f"It was saved by fggm_peft {made}: upgrade the library."
        )
    for name, legal in (("delta_dtype", DELTA_DTYPES), ("check_base", (True, False))):
        require_one_of(name, getattr(config, name), legal)
    for name in ("made_with", "density_by_module"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
            raise AdapterFileError(f"{name} is a dict of texts, got {value!r:.80}")
    try:
        from_layer_groups(config.density_by_module or {})
        sketches_from(config.base_fingerprint or {})
    except ValueError as error:
        raise AdapterFileError(str(error)) from error


def versions() -> dict[str, str]:
    """The versions of the libraries that an adapter depends on; PEFT writes its own."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"fggm_peft": __version__, **found}


def by_layer_group(numbers: Mapping[str, float]) -> dict[str, str]:
    """Module path -> number, in few words: paths with * for their numbers -> "NUMBERS:NUMBER ...".

    ``{"layers.0.up": 0.3, "layers.1.up": 0.25, "head": 1.0}`` becomes ``{"layers.*.up": "0:0.3 1:0.25", "head": "1"}``.
    """
    groups: dict[str, list[str]] = {}
    for name, number in numbers.items():
        parts = [part for part in name.split(".") if part.isdecimal()]
        group = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(group, []).append(f"{'.'.join(parts)}:{number:.6g}" if parts else f"{number:.6g}")
    return {group: " ".join(entries) for group, entries in groups.items()}


def from_layer_groups(groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The inverse, group by group: ``{"layers.*.up": {"0": 0.3, "1": 0.25}, "head": {"": 1.0}}``.

    Raises:
        ValueError: a text is not of that form.
    """
    found: dict[str, dict[str, float]] = {}
    for group, text in groups.items():
        for entry in text.split():
            place, _, number = entry.rpartition(":")
            if not re.fullmatch(r"(\d+(\.\d+)*)?", place):
                raise ValueError(f"density_by_module[{group!r}]: {entry!r} is not NUMBERS:DENSITY")
            found.setdefault(group, {})[place] = float(number)
    return found


def describe_file(config: FGGMConfig, densities: Mapping[str, float]) -> None:
    """Write into the config what is known when an adapter is saved."""
    config.fggm_format = FORMAT
    config.made_with = versions()
    config.density_by_module = by_layer_group(densities) or None
