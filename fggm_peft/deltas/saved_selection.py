"""The selection of a saved adapter, read from its files. No weights of the base are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..core.errors import AdapterFileError
from ..core.fingerprint import sketches_from
from ..core.spectrum import spectrum
from ..tuner.config import FGGMConfig
from ..tuner.files.hub import from_hub
from ..tuner.files.reading import find_adapter, read_supports
from ..tuner.files.task_scores import SCORES_FILE, load_record


@dataclass(frozen=True)
class SavedAdapter:
    """One saved adapter.

    Args:
        name: folder or Hub id, as the user gave it.
        folder: folder of its files.
    """

    name: str
    folder: Path
    config: FGGMConfig

    @property
    def checks(self) -> list[tuple[int, float | None]]:
        """Samples and agreement at each check of ``num_samples="auto"``; empty if the config has none."""
        checks = (self.config.selection or {}).get("checks", [])
        return [tuple(check) for check in checks if _is_check(check)] if isinstance(checks, list) else []

    def shares(self) -> dict[str, tuple[float, int]]:
        """Module path -> density of the support, number of entries of the weight."""
        config, supports = read_supports(self.folder)
        sketches = sketches_from(config.base_fingerprint or {})
        shapes = {path: sketches[path].shape for path in sketches if path in supports}
        return {
            path: (len(supports[path]) / config.granularity.units(shape), shape[0] * shape[1])
            for path, shape in shapes.items()
        }

    def why_no_spectrum(self) -> str | None:
        """The reason why the spectrum of its scores is unknown; None if it is known."""
        if not (self.folder / SCORES_FILE).is_file():
            return "no scores were saved (fggm select --save-scores)"
        if self.config.criterion != "fisher":
            return f"the file contains the statistics of {self.config.criterion!r}, not its scores"
        if self.config.granularity.saves_factored:
            return "scores of single elements are saved as row and column sums"
        if self.config.protect:
            return "protection scaled the scores after they were saved"
        return None

    def spectra(self) -> dict[str, list[float]]:
        """Module path -> spectrum of its saved scores.

        Raises:
            ScoreFileError: the file is damaged.
        """
        scores = load_record(self.folder).scores.get("fisher", {})
        return {path: spectrum(stored[0]) for path, stored in scores.items()}


def _is_check(entry: Any) -> bool:
    """Whether an entry of a config, which may come from a stranger, is a pair of samples and agreement."""
    if not isinstance(entry, list) or [type(part) for part in entry] not in ([int, float], [int, type(None)]):
        return False
    return entry[0] > 0 and (entry[1] is None or -1 <= entry[1] <= 1)


def saved_adapter(name: str) -> SavedAdapter:
    """Find an adapter by its folder or Hub id.

    Raises:
        AdapterFileError: a file is missing or damaged.
        ValueError: the adapter belongs to another method.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SCORES_FILE]
        with from_hub(name, "adapter", AdapterFileError):
            folder = Path(snapshot_download(name, allow_patterns=files))
    config, _ = find_adapter(folder)
    return SavedAdapter(name, folder, config)
