"""``fggm inspect``: checks an adapter, and shows its contents."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from .output import Result, add_adapter, facts_table, require_adapter, table

if TYPE_CHECKING:
    from ..deltas.delta import ModuleDelta


def add_options(parser: ArgumentParser) -> None:
    add_adapter(parser)
    parser.add_argument("--base", "-b", help="Folder or Hub id of the base that the adapter should fit.")


def run(args: Namespace) -> Result:
    """Check every tensor of ADAPTER, and show its changes and the rank that each module requires as a LoRA.

    With --base, the command loads the base and checks that the adapter was made on it. An error names the file and the
    tensor.
    """
    require_adapter(args.adapter)
    from rich.console import Group

    from ..deltas import SparseDelta, verify

    data = verify(args.adapter, args.base)
    delta = SparseDelta.read(args.adapter)
    modules = {path: _figures(module) for path, module in delta.modules.items()}
    data["norm"] = sum(module["norm"] ** 2 for module in modules.values()) ** 0.5
    data["lora_rank"] = max((module["lora_rank"] for module in modules.values()), default=0)
    selection = delta.config.selection or {}
    facts = {**data, **{name: selection.get(name) for name in ("samples", "regret", "made_by")}}
    facts["made_with"] = [f"{name} {version}" for name, version in sorted(data["made_with"].items())]
    rows = []
    for path, module in modules.items():
        row = (path, " × ".join(map(str, module["shape"])), f"{module['units']:,}", f"{module['density']:.2%}")
        rows.append((*row, f"{module['norm']:.4g}", str(module["lora_rank"])))
    shown = table("", ("module", "weight", "units", "density", "norm", "LoRA rank"), rows)
    data |= {"selection": delta.config.selection, "modules": modules}
    return data, Group(facts_table(f"{args.adapter} is valid", facts), shown)


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
