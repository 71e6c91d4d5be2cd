"""What the exports to other methods of PEFT have in common: the layers of the base, the config and the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.files.atomic import complete_folder
from ..tuner.files.reading import adapted_layers
from ..tuner.layer import FGGMLayer
from .base_model import Base, skeleton
from .delta import SparseDelta


def base_of(adapter: Any, delta: SparseDelta, base: Base | None) -> Base:
    """The given base, or the one of the adapter; raises ``ValueError`` if it has none."""
    base = base or (adapter if isinstance(adapter, PeftModel) else delta.config.base_model_name_or_path)
    if not base:
        raise ValueError(
            "the adapter does not say whether its weights belong to linear layers, convolutions or embeddings, and its "
            "config names no base model: pass the base model, or its folder or Hub id, as base="
        )
    return base


def layers_of(adapter: Any, delta: SparseDelta, base: Base | None) -> dict[str, FGGMLayer]:
    """The layers that a delta changes, by module path, without weights unless ``base`` is a model."""
    model = skeleton(base_of(adapter, delta, base), delta.config)
    return adapted_layers(model, {path: module.shape for path, module in delta.modules.items()})


def write_adapter(
    output: str | Path,
    delta: SparseDelta,
    tensors: Mapping[str, Tensor],
    method: Callable[..., PeftConfig],
    **settings: Any,
) -> None:
    """Write an adapter of another method, with the delta's whole tensors, for the same base."""
    config = method(
        modules_to_save=delta.config.modules_to_save,
        task_type=delta.config.task_type,
        base_model_name_or_path=delta.config.base_model_name_or_path,
        revision=delta.config.revision,
        inference_mode=True,
        **settings,
    )
    config.auto_mapping = delta.config.auto_mapping
    name = str(config.peft_type).removeprefix("PeftType.")
    card = ModelCardData(base_model=config.base_model_name_or_path, library_name="peft", tags=[name.lower()])
    text = f"---\n{card.to_yaml()}\n---\n\n# {name} of a sparse delta\n\nExported by fggm_peft. It is exact.\n"
    contiguous = {key: tensor.contiguous() for key, tensor in {**delta.others, **tensors}.items()}
    with complete_folder(Path(output)) as folder:
        save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        ModelCard(text).save(folder / "README.md")
        config.save_pretrained(str(folder))
