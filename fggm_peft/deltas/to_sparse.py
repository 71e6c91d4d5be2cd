"""Exports deltas as adapters of PEFT's sparse methods, SHiRA and Super-Tuning, exactly.

Both store single entries of ``nn.Linear`` weights: an index and a value for each. One setting determines the number of
entries in every module, so modules are padded with entries whose value is zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig
from torch import Tensor, nn

from ..tuner.files.tensors import PREFIX
from .apply import require_finite
from .base_model import Base
from .delta import ModuleDelta, SparseDelta
from .peft_adapter import layers_of, write_adapter


def export_supertuning(adapter: Any, output: str | Path, base: Base | None = None) -> dict[str, int]:
    """Write a delta as a Super-Tuning adapter (arXiv 2607.09287), which PEFT 0.21 loads without this library.

    Each module has as many entries as the densest one requires: PEFT computes their numbers from one ``sparsity``.

    Args:
        adapter: what ``SparseDelta.read`` accepts.
        output: the folder; its other files stay.
        base: the base model, or its folder or Hub id, for the types of its layers. By default the one that the
            adapter's config names. Not needed for a ``PeftModel``.

    Returns:
        Module path -> number of entries, padding included.

    Raises:
        ValueError: the delta is empty, or changes biases or a weight other than those of ``nn.Linear`` layers.
    """
    from peft import SupertuningConfig

    delta = SparseDelta.read(adapter)
    modules = _linear_modules(adapter, delta, base)
    sizes = {path: (_size(module), max(1, len(_entries(module)[0]))) for path, module in modules.items()}
    sparsity = 1 - max(count / size for size, count in sizes.values())
    while any(int(size * (1 - sparsity)) < count for size, count in sizes.values()):
        sparsity = math.nextafter(sparsity, 0)  # PEFT rounds down
    counts = {path: int(size * (1 - sparsity)) for path, (size, _) in sizes.items()}
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        indices, values = _padded(module, counts[path])
        tensors |= {f"{PREFIX}{path}.supertuning_indices": indices, f"{PREFIX}{path}.supertuning_values": values}
    write_adapter(output, delta, tensors, SupertuningConfig, target_modules=list(modules), sparsity=sparsity)
    return counts


def export_shira(adapter: Any, output: str | Path, base: Base | None = None) -> dict[str, int]:
    """Write a delta as a SHiRA adapter (arXiv 2406.13175), which PEFT loads without this library.

    PEFT gives a weight ``[o, i]`` ``r (o + i)`` entries, so all modules have the ``r`` that the densest one requires.
    Arguments and result are those of ``export_supertuning``.

    Raises:
        ValueError: as ``export_supertuning``, or a weight has fewer than ``r (o + i)`` entries.
    """
    delta = SparseDelta.read(adapter)
    modules = _linear_modules(adapter, delta, base)
    r = max(1, max(math.ceil(len(_entries(module)[0]) / sum(module.shape)) for module in modules.values()))
    counts = {path: r * sum(module.shape) for path, module in modules.items()}
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        if counts[path] > _size(module):
            raise ValueError(
                f"SHiRA with r={r}, which the densest module requires, has {counts[path]:,} entries in {path}, more "
                f"than its weight {list(module.shape)} has. Export to supertuning instead"
            )
        indices, values = _padded(module, counts[path])
        places = torch.stack([indices // module.shape[1], indices % module.shape[1]])
        tensors |= {f"{PREFIX}{path}.shira_indices": places, f"{PREFIX}{path}.shira_weight": values}
    write_adapter(output, delta, tensors, ShiraConfig, target_modules=list(modules), r=r)
    return counts


def _linear_modules(adapter: Any, delta: SparseDelta, base: Base | None) -> dict[str, ModuleDelta]:
    """The modules that have entries; raises ``ValueError`` if the methods cannot express the delta."""
    if delta.config.bias != "none":
        raise ValueError(f"the delta has biases (bias={delta.config.bias!r}), which the format cannot contain")
    for path, layer in layers_of(adapter, delta, base).items():
        module: Any = layer.get_base_layer()
        if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            raise ValueError(
                f"{path} is a {type(module).__name__}, and the format supports only nn.Linear. Export to lora, or "
                "merge the delta into the base (fggm merge)"
            )
        if _size(delta.modules[path]) > torch.iinfo(torch.int32).max:
            raise ValueError(f"{path} has more entries than int32 can count, which is the dtype of PEFT's indices")
        require_finite(path, delta.modules[path])
    modules = {path: module for path, module in delta.modules.items() if len(module.indices)}
    if not modules:
        raise ValueError("the delta is empty: there is nothing to export")
    return modules


def _size(module: ModuleDelta) -> int:
    return module.shape[0] * module.shape[1]


def _entries(module: ModuleDelta) -> tuple[Tensor, Tensor]:
    """The flat indices and the values of a delta's entries."""
    elements = module.as_elements(module.shape)
    return elements.indices.long(), elements.values.float()


def _padded(module: ModuleDelta, count: int) -> tuple[Tensor, Tensor]:
    """``count`` distinct entries, int32 and float32: those of the delta, and others whose value is zero."""
    indices, values = _entries(module)
    is_free = torch.ones(_size(module), dtype=torch.bool)
    is_free[indices] = False
    padding = is_free.nonzero().squeeze(1)[: count - len(indices)]
    return torch.cat([indices, padding]).int(), torch.cat([values, torch.zeros(len(padding))])
