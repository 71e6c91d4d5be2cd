"""``fggm inspect``: what is in an adapter, without its base model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Result, require_adapter

if TYPE_CHECKING:
    from rich.console import Group

    from ..deltas.delta import SparseDelta


def run(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an FGGM adapter.")],
) -> Result:
    """Show what an adapter has changed: of each module how much, and the rank that it needs as a LoRA."""
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
        "bias_entries": 0 if module.bias is None else len(module.bias),
        "lora_rank": required_rank(module),
    }


def _shown(data: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    about = Table(title=Text(data["adapter"]), show_header=False)
    about.add_column()
    about.add_column(justify="right", overflow="fold")
    lines = {
        "base": data["base"] or "not said",
        "granularity": data["granularity"],
        "criterion": data["criterion"],
        "values": f"{data['parameters']:,}",
        "density": f"{data['density']:.2%}",
        "norm of the delta": f"{data['norm']:.4g}",
        "size": decimal(data["bytes"]),
        "rank as a LoRA": str(data["lora_rank"]),
    }
    selection = data["selection"] or {}
    lines |= {name: str(selection[name]) for name in ("samples", "agreement", "made_by") if selection.get(name)}
    if data["whole_tensors"]:
        lines["whole tensors"] = str(len(data["whole_tensors"]))
    for name, text in lines.items():
        about.add_row(name, Text(text))
    table = Table()
    table.add_column("module", overflow="fold")
    for heading in ("weight", data["granularity"] + "s", "density", "norm", "LoRA rank"):
        table.add_column(heading, justify="right")
    for name, module in data["modules"].items():
        o, i = module["shape"]
        cells = [f"{o} × {i}", f"{module['units']:,}", f"{module['density']:.2%}", f"{module['norm']:.4g}"]
        table.add_row(Text(name), *cells, str(module["lora_rank"]))
    return Group(about, table)
