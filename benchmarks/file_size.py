"""Adapter file sizes with equally many trained values: FGGM, LoRA and SHiRA, against the entropy bound.

The bound is the size of the values plus the entropy of the selected positions. A LoRA has no selected positions.

python benchmarks/file_size.py [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from common import VOCABULARY, llama, show, write
from peft import get_peft_model
from suite.bases import make_base
from suite.methods import FGGM, METHODS, targeted_values, trainable
from torch import nn

from fggm_peft import FGGMConfig
from fggm_peft.core.index_codec import entropy_bytes
from fggm_peft.deltas import verify

FILE = "adapter_model.safetensors"


def saved(model: nn.Module, dtype: torch.dtype) -> tuple[int, int | None]:
    """Size of the file with random values in ``dtype``, and the bound of an FGGM adapter."""
    config = model.peft_config["default"]
    is_fggm = isinstance(config, FGGMConfig)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
            parameter.data = parameter.data if is_fggm else parameter.data.to(dtype)
    if is_fggm:
        config.delta_dtype = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / FILE).stat().st_size, verify(folder)["bound_bytes"] if is_fggm else None


def measure(hidden: int, layers: int, density: float, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    base = make_base(hidden, layers, VOCABULARY, "bfloat16")
    entries = targeted_values(base)
    count = round(entries * density)
    results = {}
    for name in (*FGGM, "LoRA", "SHiRA"):
        model = METHODS[name](base, count)
        size, bound = saved(model, dtype)
        values = trainable(model)
        if bound is None:  # SHiRA selects elements; a LoRA selects nothing
            chosen = entropy_bytes(values, entries) if name == "SHiRA" else 0
            bound = round(chosen) + values * dtype.itemsize
        results[name] = {"values": values, "bytes": size, "bytes_per_value": size / values, "over_bound": size / bound}
    return results


def nine_million() -> dict[str, float]:
    """9,175,040 values in rows of 1024, in bfloat16."""
    base = llama(1024, 4, torch.bfloat16).requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    config = FGGMConfig(target_modules=targets, budget=9_175_040, criterion="random")
    model = get_peft_model(base, config)
    size, _ = saved(model, torch.bfloat16)
    return {"values": trainable(model), "bytes": size, "mib": size / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only one case")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    cases = [(density, dtype) for density in (0.01, 0.05, 0.3) for dtype in (torch.bfloat16, torch.float32)]
    results = {}
    for density, dtype in cases[:1] if arguments.quick else cases:
        name = f"hidden 1024 x 4 layers, {str(dtype).removeprefix('torch.')}, density {density:.0%}"
        results[name] = measure(1024, 4, density, dtype)
        show(name, results[name])
    if not arguments.quick:
        results["9,175,040 values in rows, bfloat16"] = nine_million()
        print(results["9,175,040 values in rows, bfloat16"])
        print("written to", write("file_size", results))


if __name__ == "__main__":
    main()
