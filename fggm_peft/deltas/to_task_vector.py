"""Exports deltas as task vectors (arXiv 2212.04089): the dense change of each weight, by its name in the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.files.atomic import complete_folder
from .apply import require_finite
from .base_model import Base, skeleton
from .delta import SparseDelta
from .difference import weight_name
from .peft_adapter import base_of, layers_of

FILE = "task_vector.safetensors"


def export_task_vector(adapter: Any, output: str | Path, base: Base | None = None) -> dict[str, int]:
    """Write the changes of the base's weights as dense float32 tensors, in the file ``task_vector.safetensors``.

    Args:
        adapter: what ``SparseDelta.read`` accepts.
        output: the folder; its other files stay.
        base: the base model, or its folder or Hub id, for the names of its weights. By default the one that the
            adapter's config names. Not needed for a ``PeftModel``.

    Returns:
        Name of a weight in the base's state dict -> number of entries that are not zero.

    Raises:
        ValueError: the delta has whole tensors (``modules_to_save``, biases), which are no differences, or the base is
            a quantized model.
    """
    delta = SparseDelta.read(adapter)
    if whole := delta.whole_tensors:
        raise ValueError(f"the delta has whole tensors ({whole[0]}, ...), which are no differences")
    model = skeleton(base_of(adapter, delta, base), delta.config)
    parameters: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    vector: dict[str, Tensor] = {}
    for path, layer in layers_of(adapter, delta, model).items():
        if layer.quantization_backend is not None:
            raise ValueError(f"{path} is quantized, so its weight has another shape. Pass the dense base as base=")
        module, name = delta.modules[path], weight_name(path, layer)
        require_finite(path, module)
        if name not in vector:  # experts share a tensor
            vector[name] = torch.zeros(parameters[name].shape)
        module.granularity.add_(layer.part(vector[name]), module.indices, module.values)
    with complete_folder(Path(output)) as folder:
        save_file(vector, folder / FILE, {"format": "pt"})
    return {name: int(change.count_nonzero()) for name, change in vector.items()}
