"""Exports deltas as LoRA adapters of PEFT, exactly, for software that does not know this library.

A delta of k rows is a LoRA of rank k: A contains the rows, and B is one-hot. A delta of k columns is the transpose.
Single elements need as many ranks as there are rows or columns that contain them, whichever are fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.files.atomic import complete_folder
from ..tuner.files.reading import adapted_layers
from ..tuner.files.tensors import PREFIX
from ..tuner.layer import FGGMLayer
from ..tuner.layer_types import FGGMConv, FGGMEmbedding
from .base_model import Base, skeleton
from .delta import ModuleDelta, SparseDelta

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Maximum ranks that engines accept (vLLM's list). Ranks are padded with zeros to the next of them."""


@dataclass(frozen=True)
class LoraRank:
    """The rank of one module.

    Args:
        required: rank of the exact LoRA.
        rank: rank in the file, padding included.
    """

    required: int
    rank: int


@dataclass(frozen=True)
class LoraExport:
    """The ranks of an exported adapter.

    Args:
        modules: module path -> its rank. Modules with a delta of zero are left out.
    """

    modules: dict[str, LoraRank]

    @property
    def required_rank(self) -> int:
        """Largest rank that a module requires."""
        return max(module.required for module in self.modules.values())

    @property
    def rank(self) -> int:
        """Largest rank in the file, which an engine has to accept."""
        return max(module.rank for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        modules = {path: asdict(module) for path, module in self.modules.items()}
        return {"required_rank": self.required_rank, "rank": self.rank, "modules": modules}

    def __str__(self) -> str:
        return f"exact LoRA of {len(self.modules)} modules: requires rank {self.required_rank}, has rank {self.rank}"


def lora_ranks(adapter: Any, base: Base | None = None, adapter_name: str | None = None) -> LoraExport:
    """The ranks of the adapter that ``export_lora`` would write; raises what ``export_lora`` raises."""
    return _plan(*_read(adapter, base, adapter_name))


def export_lora(
    adapter: Any,
    output: str | Path,
    max_rank: int | None = None,
    base: Base | None = None,
    adapter_name: str | None = None,
) -> LoraExport:
    """Write a delta as a LoRA adapter that PEFT loads without this library. It is exact and has a scale of 1.

    Ranks are padded with zeros to a rank that engines accept (``RANKS``), but not above ``max_rank``.

    Args:
        adapter: what ``SparseDelta.read`` accepts.
        output: the folder; its other files stay.
        max_rank: largest rank that may be written.
        base: the base model, or its folder or Hub id, for the types of its layers. By default the one that the
            adapter's config names. Not needed for a ``PeftModel``.
        adapter_name: the adapter of a ``PeftModel``; the active one by default.

    Raises:
        ValueError: the delta is zero, requires a rank above ``max_rank``, or needs a convolution that LoRA does not
            support: with groups, dilation or a padding mode.
    """
    if max_rank is not None and (not isinstance(max_rank, int) or isinstance(max_rank, bool) or max_rank < 1):
        raise ValueError(f"max_rank must be an integer > 0 or None, got {max_rank!r}")
    delta, layers = _read(adapter, base, adapter_name)
    plan = _plan(delta, layers, max_rank)
    tensors = dict(delta.others)
    for path, lora in plan.modules.items():
        tensors |= _lora_tensors(PREFIX + path, layers[path], *_factors(delta.modules[path], lora.rank))
    config = _config(delta, plan, layers)
    card = ModelCardData(base_model=config.base_model_name_or_path, library_name="peft", tags=["lora"])
    text = f"---\n{card.to_yaml()}\n---\n\n# LoRA of a sparse delta\n\nExported by fggm_peft: {plan}.\n"
    with complete_folder(Path(output)) as folder:
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        ModelCard(text).save(folder / "README.md")
        config.save_pretrained(str(folder))
    return plan


def required_rank(module: ModuleDelta) -> int:
    """Rank of the exact LoRA: the number of rows or columns that the delta changes, whichever are fewer."""
    return min(len(lines) for lines in _changed_lines(module))


def _read(adapter: Any, base: Base | None, adapter_name: str | None) -> tuple[SparseDelta, dict[str, FGGMLayer]]:
    """The delta, and the layers of its base by module path."""
    if isinstance(adapter, PeftModel):
        base = base if base is not None else adapter
    delta = SparseDelta.read(adapter, adapter_name)
    base = base if base is not None else delta.config.base_model_name_or_path
    if not base:
        raise ValueError(
            "the adapter does not say whether its weights belong to linear layers, convolutions or embeddings, and its "
            "config names no base model: pass the base model, or its folder or Hub id, as base="
        )
    shapes = {path: module.shape for path, module in delta.modules.items()}
    return delta, adapted_layers(skeleton(base, delta.config), shapes)


def _plan(delta: SparseDelta, layers: Mapping[str, FGGMLayer], max_rank: int | None = None) -> LoraExport:
    modules = {}
    for path, module in delta.modules.items():
        if not all(bool(tensor.isfinite().all()) for tensor in module.tensors.values()):
            raise ValueError(f"the delta of {path} has a value that is NaN or infinite")
        required = required_rank(module)
        if not required:
            continue
        _require_supported(path, layers[path])
        if max_rank is not None and required > max_rank:
            raise ValueError(
                f"the delta of {path} requires a LoRA of rank {required}, more than max_rank={max_rank}. For an "
                f"approximation use PEFT: convert_to_lora(model, rank={max_rank}), or save_as_lora to write it"
            )
        padded = next((rank for rank in RANKS if rank >= required), required)
        modules[path] = LoraRank(required, padded if max_rank is None else min(padded, max_rank))
    if not modules:
        raise ValueError("the delta is zero everywhere: there is nothing to export")
    return LoraExport(modules)


def _require_supported(path: str, layer: FGGMLayer) -> None:
    """Raise ``ValueError`` if PEFT's LoRA of this layer cannot express the delta."""
    base: Any = layer.get_base_layer()
    if not isinstance(layer, FGGMConv):
        return
    is_plain = {"groups": base.groups == 1, "dilation": set(base.dilation) == {1}}
    is_plain["padding_mode"] = base.padding_mode == "zeros"
    if unsupported := next((setting for setting, plain in is_plain.items() if not plain), None):
        raise ValueError(
            f"{path} is a convolution with {unsupported}={getattr(base, unsupported)!r}, which PEFT's LoRA ignores. "
            "Leave it out of the delta, or merge the delta into the base (fggm merge)"
        )


def _changed_lines(module: ModuleDelta) -> list[Tensor]:
    """The sorted indices of the rows and of the columns that are not zero."""
    elements = module.weight_delta().as_elements(module.shape)
    changed = elements.indices[elements.values != 0]
    return [(changed // module.shape[1]).unique().long(), (changed % module.shape[1]).unique().long()]


def _factors(module: ModuleDelta, rank: int) -> tuple[Tensor, Tensor]:
    """``A`` ``[rank, i]`` and ``B`` ``[o, rank]`` with ``B @ A`` equal to the delta."""
    matrix = torch.zeros(module.shape, dtype=torch.promote_types(module.values.dtype, torch.float32))
    module.granularity.add_(matrix, module.indices, module.values)
    rows, columns = _changed_lines(module)
    a, b = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    if len(rows) <= len(columns):
        a[: len(rows)] = matrix[rows]
        b[rows, torch.arange(len(rows))] = 1
    else:
        a[torch.arange(len(columns)), columns] = 1
        b[:, : len(columns)] = matrix[:, columns]
    return a, b


def _lora_tensors(prefix: str, layer: FGGMLayer, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The factors with PEFT's names and shapes for this type of layer."""
    if isinstance(layer, FGGMEmbedding):  # its weight is [tokens, features], and LoRA's delta is (B A)^T
        return {f"{prefix}.lora_embedding_A": b.mT, f"{prefix}.lora_embedding_B": a.mT}
    if isinstance(layer, FGGMConv):
        base: Any = layer.get_base_layer()
        kernel = base.weight.shape[2:]
        a, b = a.view(len(a), -1, *kernel), b.view(*b.shape, *[1] * len(kernel))
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def _config(delta: SparseDelta, plan: LoraExport, layers: Mapping[str, FGGMLayer]) -> LoraConfig:
    """A config with a scale of 1: alpha equals the rank in every module. ``r`` is the largest rank."""
    # the longest path first, because PEFT uses the first pattern that matches the end of a path
    paths = sorted(plan.modules, key=len, reverse=True)
    ranks = {path: plan.modules[path].rank for path in paths if plan.modules[path].rank != plan.rank}
    transposed = Counter(bool(getattr(layers[path], "is_transposed", False)) for path in paths)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.rank,
        rank_pattern=dict(ranks),
        alpha_pattern=dict(ranks),
        target_modules=list(plan.modules),
        bias=delta.config.bias,
        fan_in_fan_out=transposed[True] > transposed[False],
        modules_to_save=delta.config.modules_to_save,
        task_type=delta.config.task_type,
        base_model_name_or_path=delta.config.base_model_name_or_path,
        revision=delta.config.revision,
        inference_mode=True,
    )
    config.auto_mapping = delta.config.auto_mapping
    return config
