"""Which models the fingerprint of a base distinguishes: other dtypes, quantized, with noise, and fine-tuned.

python benchmarks/fingerprint.py MODEL [--tasks FOLDER ...]

MODEL is a folder or Hub id. A FOLDER contains the deltas of a sequence of tasks (``tasks`` of a run of
``fggm sequence``), which are merged into the model one after another. Writes results/fingerprint.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import write
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fggm_peft import FGGMConfig
from fggm_peft.core.fingerprint import exact_difference, relative_distance, sketches_from
from fggm_peft.tuner import find_targets
from fggm_peft.tuner.files.base_check import base_difference, fingerprint

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
NOISE = [1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.5]
Fingerprint = dict[str, str]


def load(model: str, kind: str) -> dict:
    """The adapted layers of a model in a dtype or a quantization."""
    if kind in DENSE:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=DENSE[kind])
    else:
        config = BitsAndBytesConfig(**QUANTIZED[kind])
        base = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=torch.bfloat16)
    targets = find_targets(get_peft_model(base, FGGMConfig(target_modules="all-linear")), "default")
    return {path: target.layer for path, target in targets.items()}


def compared(stored: Fingerprint, layers: dict) -> dict[str, float | int | bool]:
    """Distance of the sampled entries, number of dense modules that differ, and the verdict."""
    loaded = sketches_from(fingerprint(layers))
    pairs = [(sketch, loaded[name]) for name, sketch in sketches_from(stored).items()]
    pairs = [(a, b) for a, b in pairs if a.samples is not None and b.samples is not None]
    count = [min(len(a.samples), len(b.samples)) for a, b in pairs]  # the same positions, possibly fewer
    exact = sum(exact_difference(a, b) > 0 for a, b in pairs if not (a.quantized or b.quantized))
    start = time.perf_counter()
    refused = base_difference(layers, stored) is not None
    return {
        "distance": relative_distance([(a.samples[:n], b.samples[:n]) for (a, b), n in zip(pairs, count, strict=True)]),
        "modules_that_differ": exact,
        "refused": refused,
        "seconds": time.perf_counter() - start,
    }


def disturb(by: float, share: float = 1.0, rows: bool = False) -> Callable[[nn.Module], None]:
    """Add normal noise to the linear layers, ``by`` times the standard deviation of their weights."""

    def apply(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                weight = module.weight.data
                noise = torch.randn(weight.shape, generator=generator) * weight.std() * by
                shape = (len(weight), 1) if rows else weight.shape
                weight += noise * (torch.rand(shape, generator=generator) < share)

    return apply


def merge_tasks(folder: Path, count: int) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        for task in sorted(folder.iterdir())[:count]:
            PeftModel.from_pretrained(model, str(task)).merge_and_unload()

    return apply


def siblings(folders: list[Path]) -> dict[str, Callable[[nn.Module], None]]:
    changes = {f"noise {by:g}": disturb(by) for by in NOISE}
    changes |= {
        "noise 0.001 on 1 % of the elements": disturb(1e-3, 0.01),
        "noise 0.001 on 5 % of the rows": disturb(1e-3, 0.05, rows=True),
    }
    for folder in folders:
        run = folder.parent.name if folder.name == "tasks" else folder.name
        total = len(list(folder.iterdir()))
        for count in sorted({1, total}):
            changes[f"{count} of {total} tasks of {run}"] = merge_tasks(folder, count)
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = [*DENSE, *QUANTIZED]
    own = {kind: load(arguments.model, kind) for kind in kinds}
    start = time.perf_counter()
    fingerprints = {"float32": fingerprint(own["float32"])}
    seconds = time.perf_counter() - start
    fingerprints |= {kind: fingerprint(own[kind]) for kind in kinds if kind != "float32"}
    results = {
        "fingerprint": {
            "seconds": seconds,
            "parameters": sum(o * i for o, i in (layer.weight_shape for layer in own["float32"].values())),
            "modules": len(own["float32"]),
            "bytes": {kind: len(json.dumps(stored)) for kind, stored in fingerprints.items()},
        },
        "itself": {source: {kind: compared(fingerprints[source], own[kind]) for kind in kinds} for source in kinds},
        "siblings": {},
    }
    del own
    for name, change in siblings(arguments.tasks).items():
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        change(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            comparisons = {
                kind: compared(fingerprints["float32"], load(folder, kind))
                for kind in ("float32", "bfloat16", "int8", "nf4")
            }
        results["siblings"][name] = comparisons
        verdicts = {
            kind: ("refused" if entry["refused"] else "accepted", entry["distance"])
            for kind, entry in comparisons.items()
        }
        print(name, verdicts, flush=True)
    print("written to", write("fingerprint", results))


if __name__ == "__main__":
    main()
