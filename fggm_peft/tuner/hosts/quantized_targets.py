"""``target_modules="all-linear"`` on a quantized or compiled base."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import resolve_quantization_backend
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import FGGMConfig
from .sharding import plain_name, without_wrappers


def expand_all_linear_(config: FGGMConfig, model: nn.Module) -> None:
    """Expand "all-linear" to module paths, as in PEFT.

    It includes quantized layers that PEFT misses, because they are not ``nn.Linear`` (HQQ, GPTQ), and the whole of
    ``nn.MultiheadAttention``. The paths are those of the model without ``torch.compile``.
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
    paths = {_owner(model, path) for path in map(plain_name, config.target_modules | missed)}
    if config.layers_to_transform is not None:  # PEFT ignores it for paths
        config.target_modules = {path.rpartition(".")[2] for path in paths}
        paths = {path for path in paths if check_target_module_exists(config, path)}
        if not paths:
            raise ValueError(f"layers_to_transform={config.layers_to_transform} is no layer with a linear module")
    config.target_modules = paths
    if skipped := _skipped(model, config.target_parameters or (), paths):
        warnings.warn(
            f"target_modules='all-linear' skips the experts and routers {', '.join(skipped)}. To adapt them, set "
            f"target_parameters={skipped}.",
            stacklevel=2,
        )


def _owner(model: nn.Module, path: str) -> str:
    """The module to target for a linear layer: ``nn.MultiheadAttention`` does not call its own."""
    parent = path.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), nn.MultiheadAttention) else path


def _skipped(model: nn.Module, targeted: Iterable[str], paths: set[str]) -> list[str]:
    """Names for ``target_parameters`` of the parameters of experts and routers that are not targeted."""
    names: dict[str, None] = {}
    for path, module in model.named_modules():
        if hasattr(module, "num_experts") and path not in paths and not isinstance(module, BaseTunerLayer):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and "bias" not in name and "base_layer" not in path:
                    names[f"{path.rpartition('.')[2]}.{name}"] = None
    return [name for name in names if not any(f".{name}".endswith(f".{other}") for other in targeted)]


def _is_missed_by_peft(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return False
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
