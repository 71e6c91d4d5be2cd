"""Access to base models: their layers without weights, and their weights one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME

from ..tuner.config import FGGMConfig
from ..tuner.files.hub import expanded, from_hub, user_path
from ..tuner.files.model_card import AUTO_CLASSES

Base = nn.Module | str | Path
"""A model, or the folder or Hub id of one."""


def load_base(base: Base, config: FGGMConfig) -> nn.Module:
    """The given model, or the one that an adapter's config describes, in the dtype of its checkpoint."""
    if isinstance(base, nn.Module):
        return base
    model_class, settings = _class_of(base, config)
    revision = config.revision or "main"
    return model_class.from_pretrained(expanded(str(base)), config=settings, revision=revision, dtype="auto")


def skeleton(base: Base, config: FGGMConfig | None = None) -> nn.Module:
    """As ``load_base``, but on the meta device, without weights."""
    if isinstance(base, nn.Module):
        return base.get_base_model() if isinstance(base, PeftModel) else base
    model_class, settings = _class_of(base, config or FGGMConfig())
    with torch.device("meta"):
        return getattr(model_class, "from_config", model_class)(settings)


def _class_of(base: str | Path, config: FGGMConfig) -> tuple[Any, Any]:
    """The class and the config of a base model."""
    import transformers

    settings = settings_of(str(base), config.revision)
    task = str(config.task_type).removeprefix("TaskType.")
    saved = (config.auto_mapping or {}).get("base_model_class")
    names = [AUTO_CLASSES.get(task), saved, *(settings.architectures or []), "AutoModel"]
    return next(getattr(transformers, name) for name in names if name and hasattr(transformers, name)), settings


def settings_of(name: str, revision: str | None = None) -> Any:
    """The config of a model; raises ``ValueError`` if the model has no config."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(expanded(name), revision=revision or "main")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"there is no base model {name!r} ({reason}). Pass its folder or Hub id, or the model itself, as base="
        ) from error


class Weights:
    """The weights of a model or of a checkpoint (one safetensors file, or shards), read on demand.

    Raises:
        FileNotFoundError: there is no safetensors file. Pickled weights are not read.
        ValueError: a file is damaged.
    """

    def __init__(self, source: Base):
        self.where = type(source).__name__ if isinstance(source, nn.Module) else str(source)
        self.stored: Mapping[str, Tensor | Path]  # tensors in memory, or the file of each
        if isinstance(source, nn.Module):
            self.stored = source.state_dict(keep_vars=True)
            return
        folder = user_path(source)
        if not folder.is_dir():
            with from_hub(str(source), "checkpoint", FileNotFoundError):
                folder = Path(snapshot_download(str(source), allow_patterns=["model*.safetensors"]))
        self.stored = _files(folder)

    def find(self, names: Iterable[str], prefix: str = "") -> Tensor | None:
        """The tensor under the first name that exists."""
        return next((self.read(variant) for variant in variants(names, prefix) if variant in self.stored), None)

    def read(self, name: str) -> Tensor:
        stored = self.stored[name]
        if isinstance(stored, Path):
            with _opened(stored) as tensors:
                return tensors.get_tensor(name)
        if stored.is_meta:
            raise ValueError(f"{name} is on the meta device: the model's weights were never loaded")
        return stored.detach().to("cpu")


def names_of_tensors(model: nn.Module) -> dict[str, list[str]]:
    """The parameters and persistent buffers of a model: first name -> all names of the tensor."""
    buffers = dict(model.named_buffers())
    names: dict[int, list[str]] = {}
    tensors: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or name in buffers:
            names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def variants(names: Iterable[str], prefix: str = "") -> list[str]:
    """The names that a tensor of a model may have in a checkpoint: those of a base without a head omit ``prefix``."""
    return [variant for name in names for variant in (name, name.removeprefix(f"{prefix}.") if prefix else name)]


def _files(folder: Path) -> dict[str, Path]:
    """Name of a tensor -> its file."""
    single = folder / SAFE_WEIGHTS_NAME
    files = [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no {SAFE_WEIGHTS_NAME} and no shards of it in {str(folder)!r}. Pickled weights are not read: load the "
            "model and save it again with save_pretrained"
        )
    stored: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            stored |= dict.fromkeys(tensors.keys(), file)
    return stored


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
