"""Exports deltas as stock LoRA adapters, for PEFT without this library and for engines that only know LoRA.

The change of a weight that touches k rows is a LoRA of rank k: A holds the rows and B is one-hot; k columns are the
transpose. Single elements are as many rows or columns as they lie in, whichever are fewer. Above a greatest rank the
change is cut by its singular values, and the error is measured on what is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..tuner.files.atomic import complete_folder
from ..tuner.files.reading import module_paths
from ..tuner.files.tensors import PREFIX
from ..tuner.layer import FGGMLayer
from ..tuner.layer_types import FGGMConv, FGGMEmbedding
from .delta import ModuleDelta, SparseDelta
from .meta_base import Base, layer_of, skeleton

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What engines accept as a greatest rank (vLLM's list); ranks are padded with zeros to the next of them."""

_CARD = """\
---
base_model: {base}
library_name: peft
tags:
- lora
---

# LoRA of a sparse delta

Exported from a sparse delta of fggm_peft: {count} weights, greatest rank {rank}, {error}. It loads with PEFT alone.
"""


@dataclass(frozen=True)
class ModuleLora:
    """The LoRA of one module.

    Args:
        required: the rank at which it is exact.
        rank: the rank that is written, padding included.
        error: ``|delta - B A| / |delta|`` in the Frobenius norm, measured on what is written; 0 before it is.
    """

    required: int
    rank: int
    error: float = 0.0

    @property
    def is_exact(self) -> bool:
        return self.rank >= self.required


@dataclass(frozen=True)
class LoraExport:
    """What an export wrote, or would write.

    Args:
        modules: module path -> its LoRA. Modules whose delta is zero have none.
        delta_norm: Frobenius norm of the whole delta.
        error: relative error of the whole.
    """

    modules: dict[str, ModuleLora]
    delta_norm: float
    error: float = 0.0

    @property
    def required_rank(self) -> int:
        """The greatest rank that any module needs to be exact."""
        return max(module.required for module in self.modules.values())

    @property
    def rank(self) -> int:
        """The greatest rank that is written: what an engine has to accept."""
        return max(module.rank for module in self.modules.values())

    @property
    def is_exact(self) -> bool:
        return all(module.is_exact for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        modules = {name: {**asdict(module), "is_exact": module.is_exact} for name, module in self.modules.items()}
        return {
            "required_rank": self.required_rank,
            "rank": self.rank,
            "is_exact": self.is_exact,
            "relative_error": self.error,
            "modules": modules,
        }

    def __str__(self) -> str:
        how = "exact" if self.is_exact else f"relative error {self.error:.2%}"
        return (
            f"LoRA of {len(self.modules)} modules: needs rank {self.required_rank}, has rank {self.rank} at most, {how}"
        )


def lora_ranks(
    adapter: Any, max_rank: int | None = None, base: Base | None = None, adapter_name: str | None = None
) -> LoraExport:
    """What ``export_lora`` would write: the ranks that are needed, and those that there would be.

    Raises:
        ValueError: as ``export_lora``.
        TypeError: as ``export_lora``.
    """
    delta, layers = _read(adapter, base, adapter_name)
    return _plan(delta, layers, max_rank)


def export_lora(
    adapter: Any,
    output: str | Path,
    max_rank: int | None = None,
    base: Base | None = None,
    adapter_name: str | None = None,
    progress: bool = False,
) -> LoraExport:
    """Write a delta as a LoRA adapter that loads with PEFT alone.

    Exact where the ranks allow it, at a scale of 1 in every module; see ``lora_ranks`` for what they are. A rank is
    padded with zeros to one that engines accept (``RANKS``); above the last of these it is written as it is.

    Args:
        adapter: what ``SparseDelta.read`` takes.
        output: the folder; what is in it under other names stays.
        max_rank: the greatest rank that may be written. A module that needs more is cut by its singular values.
        base: the base model, or its folder or Hub id, for the types of its layers; by default the one that the
            adapter's config names. Not needed for a ``PeftModel``.
        adapter_name: which adapter of a ``PeftModel``; the active one by default.
        progress: show a bar.

    Returns:
        The ranks, and the errors measured on what was written.

    Raises:
        ValueError: the delta is zero, or has what LoRA does not: a convolution with groups, dilation or a padding of
            its own, or bias entries beside an embedding.
        TypeError: a module is of no type that can be adapted.
    """
    delta, layers = _read(adapter, base, adapter_name)
    plan = _plan(delta, layers, max_rank)
    with_bias = any(delta.modules[name].bias is not None for name in plan.modules)
    tensors = dict(delta.others)
    modules, lost = {}, 0.0
    for name, found in tqdm(plan.modules.items(), "Exporting", disable=not progress):
        module, layer = delta.modules[name], layers[name]
        matrix = _dense(module)
        a, b = _factors(matrix, found)
        square = float((matrix.double() - b.double() @ a.double()).square().sum())
        lost += square
        modules[name] = replace(found, error=(square / float(matrix.double().square().sum())) ** 0.5)
        tensors |= _named(f"{PREFIX}{name}", layer, a, b)
        if with_bias:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = _whole_bias(module)
    result = LoraExport(modules, plan.delta_norm, lost**0.5 / plan.delta_norm)
    with complete_folder(Path(output)) as folder:
        config = _config(delta, result, layers, with_bias)
        save_file(
            {key: t.contiguous() for key, t in tensors.items()}, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"}
        )
        error = "exact" if result.is_exact else f"relative error {result.error:.2%}"
        base_name = config.base_model_name_or_path or "unknown"
        card = _CARD.format(base=base_name, count=len(modules), rank=result.rank, error=error)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config.save_pretrained(str(folder))
    return result


def _read(adapter: Any, base: Base | None, adapter_name: str | None) -> tuple[SparseDelta, dict[str, FGGMLayer]]:
    """The delta, and the layers of its base by module path."""
    if isinstance(adapter, PeftModel):
        base = base if base is not None else adapter
    delta = SparseDelta.read(adapter, base, adapter_name)
    base = base if base is not None else delta.config.base_model_name_or_path
    if not base:
        raise ValueError(
            "whether a weight is that of a linear layer, a convolution or an embedding is not in the adapter's files, "
            "and its config names no base model: pass the base model, or its folder or Hub id, as base="
        )
    modules = module_paths(skeleton(base, delta.config))
    return delta, {name: layer_of(modules.get(name), name) for name in delta.modules}


def _plan(delta: SparseDelta, layers: Mapping[str, FGGMLayer], max_rank: int | None) -> LoraExport:
    if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1):
        raise ValueError(f"max_rank must be an integer > 0 or None, got {max_rank!r}")
    with_bias = any(module.bias is not None for module in delta.modules.values())
    modules, square = {}, 0.0
    for name, module in delta.modules.items():
        matrix = _dense(module)
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(f"the delta of {name} has a value that is NaN or infinite")
        touched = _touched(matrix)
        if not touched and (module.bias is None or not bool(module.bias.any())):
            continue
        _require_lora_has_it(name, layers[name], with_bias)
        square += float(matrix.double().square().sum())
        modules[name] = ModuleLora(touched, _written_rank(touched, max_rank))
    if not square:
        raise ValueError("the delta is zero everywhere: there is nothing to export")
    return LoraExport(modules, square**0.5)


def required_rank(module: ModuleDelta) -> int:
    """The rank at which a LoRA is exact: how many rows or columns the delta changes, whichever are fewer."""
    return _touched(_dense(module))


def _touched(matrix: Tensor) -> int:
    return min(int((matrix != 0).any(dim).sum()) for dim in (0, 1))


def _written_rank(required: int, max_rank: int | None) -> int:
    """The next rank that engines accept, but never more than what is allowed."""
    rank = next((rank for rank in RANKS if rank >= required), required)
    if max_rank is None or rank <= max_rank:
        return rank
    return max_rank


def _require_lora_has_it(name: str, layer: FGGMLayer, with_bias: bool) -> None:
    base = layer.get_base_layer()
    if isinstance(layer, FGGMEmbedding) and with_bias:
        raise ValueError(f"PEFT's LoRA has bias entries (lora_bias) only without embeddings, and {name} is one")
    if not isinstance(layer, FGGMConv):
        return
    unlike = {
        "groups": (base.groups, 1),
        "dilation": (set(base.dilation), {1}),
        "padding_mode": (base.padding_mode, "zeros"),
    }
    for setting, (there, plain) in unlike.items():
        if there != plain:
            raise ValueError(
                f"{name} is a convolution with {setting}={getattr(base, setting)!r}, which PEFT's LoRA computes "
                "without. Leave it out of the delta, or merge the delta into the base (fggm merge)"
            )


def _dense(module: ModuleDelta) -> Tensor:
    """The delta of one module, ``[o, i]``, in float32 at least."""
    dtype = torch.promote_types(module.values.dtype, torch.float32)
    matrix = torch.zeros(module.shape, dtype=dtype)
    module.granularity.add_(matrix, module.indices, module.values)
    return matrix


def _factors(matrix: Tensor, found: ModuleLora) -> tuple[Tensor, Tensor]:
    """``A`` ``[r, i]`` and ``B`` ``[o, r]`` with ``B A`` the matrix, or the nearest to it of this rank."""
    rows, columns = ((matrix != 0).any(dim).nonzero().squeeze(1) for dim in (1, 0))
    a = matrix.new_zeros(found.rank, matrix.shape[1])
    b = matrix.new_zeros(matrix.shape[0], found.rank)
    if not found.is_exact:
        u, s, v = torch.linalg.svd(matrix[rows][:, columns].double(), full_matrices=False)
        root = s[: found.rank].sqrt()
        b[rows, : len(root)] = (u[:, : found.rank] * root).to(b.dtype)
        a[: len(root), columns] = (root[:, None] * v[: found.rank]).to(a.dtype)
    elif len(rows) <= len(columns):
        a[: len(rows)] = matrix[rows]
        b[rows, torch.arange(len(rows))] = 1
    else:
        a[torch.arange(len(columns)), columns] = 1
        b[:, : len(columns)] = matrix[:, columns]
    return a, b


def _named(prefix: str, layer: FGGMLayer, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The factors as PEFT names and shapes them for this type of layer."""
    base: nn.Module = layer.get_base_layer()
    if isinstance(layer, FGGMEmbedding):  # its weight is [tokens, features], and LoRA's change (B A)^T
        return {f"{prefix}.lora_embedding_A": b.mT, f"{prefix}.lora_embedding_B": a.mT}
    if isinstance(layer, FGGMConv):
        kernel = base.weight.shape[2:]
        ones = [1] * len(kernel)
        weights = a.view(len(a), -1, *kernel), b.view(*b.shape, *ones)
        return {f"{prefix}.lora_A.weight": weights[0], f"{prefix}.lora_B.weight": weights[1]}
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _whole_bias(module: ModuleDelta) -> Tensor:
    bias = torch.zeros(module.shape[0])
    if module.bias is not None:
        bias[module.indices.long()] = module.bias.float()
    return bias


def _config(delta: SparseDelta, export: LoraExport, layers: Mapping[str, FGGMLayer], with_bias: bool) -> LoraConfig:
    """A scale of 1 everywhere: alpha is the rank in every module. The greatest rank is ``r``, which engines look at."""
    # the longest path first, because PEFT takes the first pattern that a path ends in
    names = sorted(export.modules, key=len, reverse=True)
    ranks = {name: export.modules[name].rank for name in names if export.modules[name].rank != export.rank}
    counts = Counter(bool(getattr(layers[name], "is_transposed", False)) for name in names)
    config = LoraConfig(
        r=export.rank,
        lora_alpha=export.rank,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        target_modules=list(export.modules),
        lora_dropout=0.0,
        lora_bias=with_bias,
        bias="all" if delta.config.bias == "all" else "none",
        fan_in_fan_out=counts[True] > counts[False],
        modules_to_save=delta.config.modules_to_save,
        task_type=delta.config.task_type,
        base_model_name_or_path=delta.config.base_model_name_or_path,
        revision=delta.config.revision,
        inference_mode=True,
    )
    config.auto_mapping = delta.config.auto_mapping
    return config
