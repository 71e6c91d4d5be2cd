"""``target_modules="all-linear"`` on a quantized or compiled base."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import resolve_quantization_backend
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import FGGMConfig
from .sharding import plain_name, without_wrappers


def expand_all_linear_(config: FGGMConfig, model: nn.Module) -> None:
    """Expand "all-linear" to module paths, as in PEFT.

    It includes quantized layers that PEFT misses, because they are not ``nn.Linear`` (HQQ, GPTQ). The paths are those
    of the model without ``torch.compile``.
    """
    targets, model = config.target_modules, without_wrappers(model)
    if not isinstance(targets, str) or targets.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    missed = {
        path
        for path, module in model.named_modules()
        if module is not head and not path.startswith(adapted) and _is_missed_by_peft(module)
    }
    _maybe_include_all_linear_layers(config, model)
    config.target_modules = set(map(plain_name, config.target_modules | missed))


def _is_missed_by_peft(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return False
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
