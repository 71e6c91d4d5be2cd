"""``fggm inspect``: shows the contents of an adapter, without its base model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import Adapter
from .output import Result, facts_table, require_adapter, table

if TYPE_CHECKING:
    from ..deltas.delta import SparseDelta


def run(adapter: Adapter) -> Result:
    """Show the changes in ADAPTER: their size in each module, and the rank that each requires as a LoRA."""
    require_adapter(adapter)
    from ..deltas import SparseDelta

    delta = SparseDelta.read(adapter)
    modules = {name: _figures(delta, name) for name in delta.modules}
    data = {
        "adapter": adapter,
        "base": delta.config.base_model_name_or_path,
        "granularity": str(delta.config.granularity),
        "criterion": delta.config.criterion,
        "parameters": delta.parameters,
        "density": delta.density,
        "norm": sum(module["norm"] ** 2 for module in modules.values()) ** 0.5,
        "bytes": delta.bytes,
        "lora_rank": max((module["lora_rank"] for module in modules.values()), default=0),
        "whole_tensors": sorted(delta.others),
        "selection": delta.config.selection,
        "modules": modules,
    }
    return Result(data, _shown(data))


def _figures(delta: SparseDelta, name: str) -> dict[str, Any]:
    from ..deltas.to_lora import required_rank

    module = delta.modules[name]
    o, i = module.shape
    return {
        "shape": [o, i],
        "units": len(module.indices),
        "density": module.values.numel() / (o * i),
        "norm": float(module.values.double().norm()),
        "largest": float(module.values.abs().max()) if module.values.numel() else 0.0,
        "dtype": str(module.values.dtype).removeprefix("torch."),
        "lora_rank": required_rank(module),
    }


def _shown(data: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.filesize import decimal

    selection = data["selection"] or {}
    facts = {
        "base": data["base"] or "unknown",
        "granularity": data["granularity"],
        "criterion": data["criterion"],
        "values": f"{data['parameters']:,}",
        "density": f"{data['density']:.2%}",
        "norm of the delta": f"{data['norm']:.4g}",
        "size": decimal(data["bytes"]),
        "rank as a LoRA": data["lora_rank"],
        "samples": selection.get("samples"),
        "agreement": selection.get("agreement") and f"{selection['agreement']:.3f}",
        "made by": selection.get("made_by"),
        "whole tensors": len(data["whole_tensors"]) or None,
    }
    rows = []
    for name, module in data["modules"].items():
        o, i = module["shape"]
        row = [name, f"{o} × {i}", f"{module['units']:,}", f"{module['density']:.2%}", f"{module['norm']:.4g}"]
        rows.append([*row, str(module["lora_rank"])])
    headings = ("module", "weight", "units", "density", "norm", "LoRA rank")
    return Group(facts_table(data["adapter"], facts), table("", headings, rows))
