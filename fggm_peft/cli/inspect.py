"""``fggm inspect``: shows the contents of an adapter, without its base model."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from .output import Result, add_adapter, facts_table, require_adapter, table

if TYPE_CHECKING:
    from ..deltas.delta import ModuleDelta


def add_options(parser: ArgumentParser) -> None:
    add_adapter(parser)


def run(args: Namespace) -> Result:
    """Show the changes in ADAPTER: their size in each module, and the rank that each requires as a LoRA."""
    require_adapter(args.adapter)
    from rich.console import Group

    from ..deltas import SparseDelta

    delta = SparseDelta.read(args.adapter)
    modules = {path: _figures(module) for path, module in delta.modules.items()}
    data = {
        "adapter": args.adapter,
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
    rows = []
    for path, module in modules.items():
        row = (path, " × ".join(map(str, module["shape"])), f"{module['units']:,}", f"{module['density']:.2%}")
        rows.append((*row, f"{module['norm']:.4g}", str(module["lora_rank"])))
    headings = ("module", "weight", "units", "density", "norm", "LoRA rank")
    made = {name: (data["selection"] or {}).get(name) for name in ("samples", "agreement", "made_by")}
    return data, Group(facts_table(args.adapter, {**data, **made}), table("", headings, rows))


def _figures(module: ModuleDelta) -> dict[str, Any]:
    from ..deltas.to_lora import required_rank

    return {
        "shape": list(module.shape),
        "units": len(module.indices),
        "density": module.values.numel() / (module.shape[0] * module.shape[1]),
        "norm": float(module.values.double().norm()),
        "dtype": str(module.values.dtype).removeprefix("torch."),
        "lora_rank": required_rank(module),
    }
