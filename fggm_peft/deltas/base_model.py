"""Access to base models: their layers without weights, and their weights one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..tuner.files.hub import from_hub
from ..tuner.files.model_card import AUTO_CLASSES

Base = nn.Module | str | Path
"""A model, or the folder or Hub id of one."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_base(name: str, revision: str | None = None) -> nn.Module:
    """Load a base model in the dtype and the class of its checkpoint.

    Args:
        name: a folder or a Hub id.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: there is no such model, or its config does not name its class.
    """
    import transformers

    settings = _settings(name, revision)
    model_class = getattr(transformers, (settings.architectures or [""])[0], None)
    if model_class is None:
        raise ValueError(f"the config of {name} names no class of transformers; pass the model itself")
    return model_class.from_pretrained(name, dtype="auto", revision=revision or "main")


def skeleton(base: Base, config: Any = None, trust_remote_code: bool = False) -> nn.Module:
    """The base model, on the meta device unless it is given as a model.

    Args:
        base: a model, or a folder or Hub id; then only its ``config.json`` is read.
        config: config of an adapter for it, which names the model's class.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: there is no such model, or transformers does not have its class.
    """
    if isinstance(base, nn.Module):
        return base.get_base_model() if isinstance(base, PeftModel) else base
    import transformers

    settings = _settings(str(base), getattr(config, "revision", None), trust_remote_code=trust_remote_code)
    task = str(getattr(config, "task_type", None)).removeprefix("TaskType.")
    saved = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    names = [AUTO_CLASSES.get(task), saved, *(settings.architectures or []), "AutoModel"]
    model_class: Any = next(getattr(transformers, name) for name in names if name and hasattr(transformers, name))
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(settings, trust_remote_code=trust_remote_code)
        return model_class(settings)


def _settings(name: str, revision: str | None, **options: Any) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision or "main", **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"there is no base model {name!r} ({reason}). Pass its folder or Hub id, or the model itself, as base="
        ) from error


class ModelWeights:
    """The weights of a model in memory, by name."""

    def __init__(self, model: nn.Module):
        self.where = type(model).__name__
        self._tensors = model.state_dict(keep_vars=True)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: the model's weights were never loaded")
        return tensor.to("cpu")


class FileWeights:
    """The weights of a checkpoint by name: one safetensors file, or shards with an index. Tensors are read on demand.

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
            with _opened(folder / SINGLE) as tensors:
                self._files = dict.fromkeys(tensors.keys(), folder / SINGLE)
        else:
            raise FileNotFoundError(
                f"no {SINGLE} or {INDEX} in {self.where!r}. Pickled weights are not read: load the model and save it "
                "again with save_pretrained"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with _opened(self._files[name]) as tensors:
            return tensors.get_tensor(name)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error


Weights = ModelWeights | FileWeights


def weights_of(source: Base) -> Weights:
    """The weights of a model, or of a checkpoint by its folder or Hub id."""
    return ModelWeights(source) if isinstance(source, nn.Module) else FileWeights(source)


def find_weight(weights: Weights, names: Iterable[str], prefix: str = "") -> Tensor | None:
    """The tensor under the first name that exists.

    Args:
        names: names of one parameter; tied parameters have several.
        prefix: path of the base in the model. Checkpoints of a base without a head omit it.
    """
    for name in names:
        for variant in (name, name.removeprefix(f"{prefix}.") if prefix else name):
            if variant in weights:
                return weights.get(variant)
    return None
