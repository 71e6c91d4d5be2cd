"""``fggm doctor``: what this machine can do."""

from __future__ import annotations

import os
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .output import Result, facts_table, table

REQUIRED = ("fggm-peft", "peft", "torch", "transformers", "accelerate", "datasets", "safetensors")
OPTIONAL = {
    "bitsandbytes": "loads base models in 4 and 8 bits: pip install 'fggm-peft[bnb]'",
    "pydantic": "is needed by fggm sequence: pip install 'fggm-peft[continual]'",
    "trl": "has SFTTrainer, DPOTrainer and GRPOTrainer: pip install 'fggm-peft[trl]'",
    "torchao": "has optimizers that round bfloat16 values stochastically: pip install 'fggm-peft[optimizers]'",
}


def add_options(parser: ArgumentParser) -> None:
    """No options."""


def run(args: Namespace) -> Result:
    """Show the versions and the device, and what is missing or will be slow.

    Paste the output into a bug report.
    """
    from rich.console import Group

    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    facts = {"python": platform.python_version(), "system": platform.platform(), **_device(), **versions}
    advice = [*_slow(), *(f"{name} is missing. It {why}" for name, why in OPTIONAL.items() if versions[name] is None)]
    shown = table("What to know", ("",), [(line,) for line in advice], show_header=False)
    return {**facts, "advice": advice}, Group(facts_table("fggm doctor", facts), *([shown] if advice else []))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "memory_bytes": properties.total_memory,
        }
    return {"device": "CPU", "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _slow() -> Iterator[str]:
    import torch

    from ..training.base_model import computes_bfloat16

    if not torch.cuda.is_available():
        yield "There is no CUDA device. The CPU is fast enough for models of some hundred million parameters."
    if not computes_bfloat16():
        yield "The device does not multiply bfloat16 in hardware: float32 is faster."
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield "HF_HUB_OFFLINE is set: only models and data on this machine can be loaded."
