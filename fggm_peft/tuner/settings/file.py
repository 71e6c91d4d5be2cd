"""Settings of the adapter file, and the values that the library writes about it."""

from __future__ import annotations

import copy
import importlib.metadata
from dataclasses import dataclass
from typing import Any, Literal, Optional

from ...core.errors import AdapterFileError
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
    index_bytes: Optional[dict[str, int]] = written("Module -> size of its encoded indices, for the same loaders.")
    base_fingerprint: Optional[dict[str, str]] = written("Module -> shape and sampled entries of the base's weight.")
    made_with: Optional[dict[str, str]] = written("Versions of the libraries that saved the adapter.")
    fggm_format: Optional[int] = written("Version of the file format.")

    def _check_format(self) -> None:
        if isinstance(self.fggm_format, int) and self.fggm_format > FORMAT:
            raise AdapterFileError(
                f"this adapter has the file format {self.fggm_format}, but fggm_peft {__version__} reads formats up to "
                f"{FORMAT}. It was made with {self.made_with!r:.200}: upgrade the library."
            )

    def describe_file(self, **fields: Any) -> None:
        """Set written fields for the next file; this config itself does not change, because adapters may share it."""
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        made_with = {"fggm_peft": __version__, **libraries}  # PEFT writes its own version
        self._of_file = {"fggm_format": FORMAT, "made_with": made_with, **fields}

    def of_file(self) -> Any:
        """A copy with the fields of ``describe_file``."""
        config = copy.copy(self)
        vars(config).update(vars(self).get("_of_file", {}))
        return config
