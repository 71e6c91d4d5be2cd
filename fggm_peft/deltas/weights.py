"""The weights of a whole model one at a time, from a model in memory or from the safetensors files of a checkpoint."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..tuner.files.hub import from_hub
from .meta_base import Base

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights(ABC):
    """Named tensors, read when they are asked for."""

    where: str

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def find(self, names: Iterable[str], prefix: str = "") -> Tensor | None:
        """The tensor under the first of the names that there is.

        Args:
            names: of one parameter; tied parameters have several.
            prefix: of the base within the model; checkpoints of a base without a head leave it out.
        """
        for name in names:
            for spelled in (name, name.removeprefix(f"{prefix}.") if prefix else name):
                if spelled in self:
                    return self.get(spelled)
        return None


class ModelWeights(Weights):
    """Those of a model in memory."""

    def __init__(self, model: nn.Module):
        self.where = type(model).__name__
        self._tensors = model.state_dict(keep_vars=True)

    def __contains__(self, name):
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: the model's weights were never loaded")
        return tensor.to("cpu")


class FileWeights(Weights):
    """Those of a checkpoint: one safetensors file, or shards with an index.

    Raises:
        FileNotFoundError: there is no safetensors file. Pickled weights are not read.
        ValueError: the index is damaged.
    """

    def __init__(self, source: str | Path):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            with from_hub(str(source), "checkpoint", FileNotFoundError):
                folder = Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json"]))
        self.where = str(source)
        self._files: dict[str, Path] = {}
        if (folder / INDEX).is_file():
            try:
                shards = json.loads((folder / INDEX).read_text())["weight_map"]
                self._files = {name: folder / Path(shard).name for name, shard in shards.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / INDEX} is damaged: {error}") from error
        elif (folder / SINGLE).is_file():
            with self._opened(folder / SINGLE) as opened:
                self._files = dict.fromkeys(opened.keys(), folder / SINGLE)
        else:
            raise FileNotFoundError(
                f"no {SINGLE} or {INDEX} in {self.where!r}. Pickled weights are not read: load the model and "
                "save_pretrained it again"
            )

    def __contains__(self, name):
        return name in self._files

    def get(self, name: str) -> Tensor:
        with self._opened(self._files[name]) as opened:
            return opened.get_tensor(name)

    def _opened(self, file: Path):
        try:
            return safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing or damaged: {error}") from error


def weights_of(source: Base) -> Weights:
    """The weights of a model, or of a checkpoint by its folder or Hub id."""
    return ModelWeights(source) if isinstance(source, nn.Module) else FileWeights(source)
