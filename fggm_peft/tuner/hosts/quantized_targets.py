"""What ``target_modules="all-linear"`` stands for on a quantized base."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import resolve_quantization_backend
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import FGGMConfig


def include_quantized_layers_(config: FGGMConfig, model: nn.Module) -> None:
    """Let "all-linear" also mean quantized linear layers that are no ``nn.Linear``, as HQQ's and GPTQ's are not.

    PEFT goes by the class, and finds none of them.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = {
        name
        for name, module in model.named_modules()
        if module is not output and not name.startswith(tuple(adapted)) and _is_linear_of_its_own(module)
    }
    if found:
        _maybe_include_all_linear_layers(config, model)
        config.target_modules |= found


def _is_linear_of_its_own(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return False  # PEFT finds it
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
