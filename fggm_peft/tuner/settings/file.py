"""Settings of the adapter file, and the values that the library writes about it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Optional

from ...core.errors import AdapterFileError
from ...core.fingerprint import sketches_from
from ...core.registry import require_one_of
from ...version import __version__
from .fields import setting, written

FORMAT = 1
"""Version of the file format."""


@dataclass
class FileSettings:
    """Fields of ``FGGMConfig`` about the adapter's files."""

    save_scores: bool = setting(
        False,
        "Save the task's scores as `fggm_scores.safetensors` with the adapter, as a reference for later tasks.",
    )
    delta_dtype: Optional[Literal["float32", "bfloat16", "float16"]] = setting(
        None, "Dtype of the values in the file; None: as trained. Loading converts them to float32."
    )
    check_base: bool = setting(
        True,
        "Whether loading the adapter onto another base model than it was trained on is an error (False: a warning). "
        "Not saved.",
    )
    support_sizes: Optional[dict[str, int]] = written(
        "Module -> number of selected units, for loaders that compare shapes, such as transformers' own."
    )
    index_shapes: Optional[dict[str, dict[str, list[int]]]] = written(
        "Module -> shapes of its encoded indices, for the same loaders."
    )
    base_fingerprint: Optional[dict[str, str]] = written("Module -> shape and sampled entries of the base's weight.")
    density_by_module: Optional[dict[str, str]] = written("Modules, * for numbers -> 'NUMBERS:DENSITY ...'.")
    made_with: Optional[dict[str, str]] = written("Versions of the libraries that saved the adapter.")
    fggm_format: Optional[int] = written("Version of the file format.")

    def _check_file(self) -> None:
        """Check the file's fields.

        Raises:
            AdapterFileError: a newer version of the library wrote the file, or a field of the library is damaged.
            ValueError: a setting is out of its range.
        """
        version = self.fggm_format
        if version is not None and (not isinstance(version, int) or isinstance(version, bool) or version < 1):
            raise AdapterFileError(f"fggm_format must be the number of a version, got {version!r}")
        if version is not None and version > FORMAT:
            writer = (self.made_with or {}).get("fggm_peft", "a later version")
            raise AdapterFileError(
                f"this adapter has the file format {version}, but fggm_peft {__version__} reads formats up to "
                f"{FORMAT}. It was saved by fggm_peft {writer}: upgrade the library."
            )
        require_one_of("delta_dtype", self.delta_dtype, (None, "float32", "bfloat16", "float16"))
        require_one_of("check_base", self.check_base, (True, False))
        for name in ("made_with", "density_by_module"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, dict) and all(isinstance(v, str) for v in value.values())):
                raise AdapterFileError(f"{name} must be a dict of texts, got {value!r:.80}")
        try:
            from_layer_groups(self.density_by_module or {})
            sketches_from(self.base_fingerprint or {})
        except ValueError as error:
            raise AdapterFileError(str(error)) from error

    def describe_file(self, densities: Mapping[str, float]) -> None:
        """Write the format, the versions and the densities (module path -> density) that are known at saving."""
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        self.fggm_format = FORMAT
        self.made_with = {"fggm_peft": __version__, **libraries}  # PEFT writes its own version
        self.density_by_module = by_layer_group(densities) or None


def by_layer_group(numbers: Mapping[str, float]) -> dict[str, str]:
    """Module path -> number in a short form: path with * for its numbers -> "NUMBERS:NUMBER ...".

    ``{"layers.0.up": 0.3, "layers.1.up": 0.25, "head": 1.0}`` becomes ``{"layers.*.up": "0:0.3 1:0.25", "head": "1"}``.
    """
    groups: dict[str, list[str]] = {}
    for path, number in numbers.items():
        parts = [part for part in path.split(".") if part.isdecimal()]
        group = ".".join("*" if part.isdecimal() else part for part in path.split("."))
        groups.setdefault(group, []).append(f"{'.'.join(parts)}:{number:.6g}" if parts else f"{number:.6g}")
    return {group: " ".join(entries) for group, entries in groups.items()}


def from_layer_groups(groups: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The inverse, group by group: ``{"layers.*.up": {"0": 0.3, "1": 0.25}, "head": {"": 1.0}}``.

    Raises:
        ValueError: a text has another form.
    """
    numbers: dict[str, dict[str, float]] = {}
    for group, text in groups.items():
        for entry in text.split():
            position, _, number = entry.rpartition(":")
            if not re.fullmatch(r"(\d+(\.\d+)*)?", position):
                raise ValueError(f"density_by_module[{group!r}]: {entry!r} is not NUMBERS:DENSITY")
            numbers.setdefault(group, {})[position] = float(number)
    return numbers
