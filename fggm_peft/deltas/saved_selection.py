"""What saved adapters chose, read from their files and the base's configuration: no weights of the base are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..core.errors import AdapterFileError
from ..core.spectrum import spectrum
from ..selection.protection import Support, supports_in_file
from ..tuner.config import FGGMConfig
from ..tuner.files.hub import from_hub
from ..tuner.files.reading import find_adapter
from ..tuner.files.task_scores import SCORES_FILE, load_record
from ..tuner.layer_types import make_layer

_SCORES = {"fisher": "fisher"}
"""Criterion -> statistic, where the scores are the statistic itself."""


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter.

    Args:
        name: as the user gave it.
        folder: where its files are.
        config: its config.
    """

    name: str
    folder: Path
    config: FGGMConfig

    @property
    def checks(self) -> list[tuple[int, float | None]]:
        """What "auto" saw when it was selected: samples and agreement; empty if its config does not say."""
        found = (self.config.selection or {}).get("checks", [])
        return [tuple(check) for check in found if _is_check(check)] if isinstance(found, list) else []

    def supports(self, model: nn.Module) -> dict[str, Support]:
        """Module path -> what the adapter holds of it; raises ``AdapterFileError`` if it was made for another base."""
        return dict(supports_in_file(model, str(self.folder)))

    def why_no_spectrum(self) -> str | None:
        """Why the spectrum of its scores is not known; None if it is."""
        if not (self.folder / SCORES_FILE).is_file():
            return "no scores were saved (fggm select --save-scores)"
        if self.config.criterion not in _SCORES:
            return f"the file of scores has what {self.config.criterion!r} looks at, not its scores"
        if self.config.granularity.saves_factored:
            return "of single elements only row and column sums are saved"
        if self.config.protect:
            return "the scores were scaled by protection, which the file does not say"
        return None

    def spectra(self) -> dict[str, list[float]]:
        """Module path -> its spectrum, from saved scores.

        Raises:
            ScoreFileError: the file is damaged.
        """
        scores = load_record(self.folder).scores.get(_SCORES[self.config.criterion], {})
        return {name: spectrum(kept[0]) for name, kept in scores.items()}


def _is_check(entry: Any) -> bool:
    """Whether an entry of a config, which a stranger may have written, is what ``summary`` writes."""
    if not isinstance(entry, list) or [type(part) for part in entry] not in ([int, float], [int, type(None)]):
        return False
    return entry[0] > 0 and (entry[1] is None or -1 <= entry[1] <= 1)


def saved_adapter(name: str) -> SavedAdapter:
    """An adapter by its folder or Hub id.

    Raises:
        AdapterFileError: a file is missing or damaged.
        ValueError: it is no FGGM adapter.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, SCORES_FILE]
        with from_hub(name, "adapter", AdapterFileError):
            folder = Path(snapshot_download(name, allow_patterns=files))
    config, _ = find_adapter(folder)
    return SavedAdapter(name, folder, config)


def shares_of(model: nn.Module, supports: dict[str, Support]) -> dict[str, tuple[float, int]]:
    """Module path -> share of its weight that may move, entries of the weight; in the model's order."""
    found = {}
    for name, module in model.named_modules():
        if name in supports:
            granularity, indices = supports[name]
            shape = make_layer(module, name).weight_shape
            found[name] = len(indices) / granularity.units(shape), shape[0] * shape[1]
    return found
