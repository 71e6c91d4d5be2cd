"""The layers of a base model without its weights: what a delta's tensors mean, and into which layers they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_quantization_kwargs
from torch import nn

from ..core.granularity import Shape
from ..tuner.files.model_card import AUTO_CLASSES
from ..tuner.files.reading import module_paths
from ..tuner.layer import FGGMLayer
from ..tuner.layer_types import make_layer

Base = nn.Module | str | Path


def skeleton(base: Base, config: Any = None, trust_remote_code: bool = False, revision: str | None = None) -> nn.Module:
    """The base model, on the meta device unless it is given as a model.

    Args:
        base: a model, or the folder or Hub id of one, of which only ``config.json`` is read.
        config: of an adapter for it; says which class of model it was made on.
        trust_remote_code: run code that comes with it.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: there is no such model, or none of its class in transformers.
    """
    if isinstance(base, nn.Module):
        return base.get_base_model() if isinstance(base, PeftModel) else base
    import transformers

    try:
        settings = transformers.AutoConfig.from_pretrained(
            str(base), trust_remote_code=trust_remote_code, revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the layers of the base model {str(base)!r} cannot be read from its config.json ({reason}). Name its "
            "folder or Hub id, or pass the model itself, as base="
        ) from error
    model_class = _model_class(settings, config)
    with torch.device("meta"):
        if hasattr(model_class, "from_config"):
            return model_class.from_config(settings, trust_remote_code=trust_remote_code)
        return model_class(settings)


def _model_class(settings: Any, config: Any) -> Any:
    import transformers

    task = str(getattr(config, "task_type", None)).removeprefix("TaskType.")
    mapped = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    names = [AUTO_CLASSES.get(task), mapped, *(settings.architectures or []), "AutoModel"]
    return next(getattr(transformers, name) for name in names if name and hasattr(transformers, name))


def layer_of(module: nn.Module | None, name: str, **quantization: Any) -> FGGMLayer:
    """How a module stores and uses its weight; the module itself is left as it is.

    Raises:
        ValueError: there is no such module.
        TypeError: it is of no type that can be adapted.
    """
    if module is None:
        raise ValueError(f"{name} is no module of this model: the delta was made for another base model")
    return module if isinstance(module, FGGMLayer) else make_layer(module, name, **quantization)


def weight_shapes(model: nn.Module, names: Any) -> dict[str, Shape]:
    """Module path -> ``(o, i)`` of its weight, for the given paths."""
    modules, quantization = module_paths(model), get_quantization_kwargs(model)
    return {name: layer_of(modules.get(name), name, **quantization).weight_shape for name in names}
