"""Estimated memory and operations of selection and training at 1.5, 7 and 70 billion weights.

The models are built on the meta device, so nothing is downloaded or computed: ``fggm_peft.estimate`` counts the tensors
of a step. Quantized weights and shards are formulas in this file. tests/integration/test_scaling.py compares all of
them with the allocations of small models.

python benchmarks/scaling.py           # writes results/scaling.json and the tables of docs/scaling.md
python benchmarks/scaling.py --tables  # writes the tables again, from the result file
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

from fggm_peft import FGGMConfig, estimate
from fggm_peft.core.granularity import GRANULARITIES, granularity_from
from fggm_peft.core.per_sample import gram_is_cheaper
from fggm_peft.step_memory import step_memory

GIB = 2**30
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
DENSITY, LENGTH = 0.1, 2048
CONTEXT = GIB // 2
"""Memory of a CUDA context and its libraries, a common assumption that is not measured here."""
SIZES = (2, 3, 64, 65)
"""Batch sizes that are counted; they give two lines, one for few samples and one for many."""
SHARES = {"bf16": 2.0, "8-bit": 1.0, "4-bit": 0.5}
DEVICES = (24, 80, 141)

MODELS: dict[str, PretrainedConfig] = {
    "1.5 B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "7 B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        use_cache=False,
    ),
    "70 B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    ),
}


def on_paper(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The frozen model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that "all-linear" adapts and bitsandbytes quantizes."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


# Formulas -----------------------------------------------------------------------------------------


def base_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of the frozen weights. Only linear layers are quantized, in the format of bitsandbytes.

    8-bit: 1 byte per entry and 4 per row. 4-bit (nf4, double quantization): half a byte per entry, 1 byte per block of
    64 entries, and 4 bytes per 256 blocks.
    """
    entries = sum(layer.weight.numel() for layer in linears(model).values())
    others = sum(p.nbytes for p in model.parameters()) - sum(layer.weight.nbytes for layer in linears(model).values())
    if precision == "bf16":
        return others + 2 * entries
    if precision == "8-bit":
        return others + entries + 4 * sum(layer.out_features for layer in linears(model).values())
    tables = 4 * (16 + 256 + 1) * len(linears(model))
    return round(others + entries / 2 + entries / 64 + 4 * entries / 64 / 256 + tables)


def score_bytes(model: nn.Module, granularity: str) -> int:
    """Running sums of the Fisher pass, in float32, for two halves of the samples."""
    return 8 * sum(granularity_from(granularity).units(tuple(m.weight.shape)) for m in linears(model).values())


def equal_rank(model: nn.Module, values: int) -> int:
    """Rank of the LoRA with this number of trainable values."""
    return max(1, round(values / sum(layer.in_features + layer.out_features for layer in linears(model).values())))


def training_multiple(method: str, density: float, checkpointing: bool) -> float:
    """Operations of a step over those of a frozen forward and backward, in the linear layers.

    A frozen pass takes 4 operations per weight and position (2 forward, 2 for the gradient of the input). FGGM adds 2
    per trainable value, full fine-tuning 2 per weight, and LoRA 6 per trainable value (two thin products, three times).
    Checkpointing repeats the forward.
    """
    per_value = {"FGGM": 2, "full": 2, "LoRA": 6}[method]
    again = 2 + (2 * density if method == "LoRA" else 0)
    return (4 + per_value * (1.0 if method == "full" else density) + (again if checkpointing else 0)) / 4


def selection_multiple(model: nn.Module, length: int) -> float:
    """Operations of the exact pass for rows over those of a frozen forward and backward, in the linear layers.

    q, k and v share the Gram matrix of their input, as do gate and up. If the Gram matrix is more expensive, the
    gradient of each sample is formed instead.
    """
    blocks = 4 if length >= 128 else 1
    share = (blocks + 1) / (2 * blocks)
    work = scores = 0.0
    for name, layer in linears(model).items():
        o, i = layer.weight.shape
        shared = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "gate_proj": 2, "up_proj": 2}.get(name.rpartition(".")[2], 1)
        work += 4 * o * i
        scores += 2 * share * length * (i / shared + o) if gram_is_cheaper(length, o, i, shared) else 2 * o * i
    return 1 + scores / work


@dataclass(frozen=True)
class Step:
    """Bytes of a step: permanent memory (values with indices, optimizer states), and memory at the peak.

    The peak is either at the logits, with all activations and no gradients of values, or near the end of backward, with
    all gradients and few activations.
    """

    values: int
    gradients: int
    optimizer: int
    activations: int
    file: int
    count: int
    most_activations: int

    @property
    def beside_the_base(self) -> int:
        return self.values + self.gradients + self.optimizer + self.activations


def fggm_step(model: nn.Module, size: int, length: int, checkpointing: bool) -> Step:
    """FGGM with rows at ``DENSITY``, AdamW and values in float32."""
    config = FGGMConfig(density=DENSITY)
    measured = estimate(
        model, config, batch_size=size, sequence_length=length, checkpointing=checkpointing, make_batch=tokens
    )
    standing = measured.base_bytes + measured.value_bytes + measured.optimizer_bytes
    gradients = measured.peak_bytes - standing - measured.activation_bytes
    return Step(
        measured.value_bytes,
        gradients,
        measured.optimizer_bytes,
        measured.activation_bytes,
        measured.adapter_bytes,
        measured.trainable_values,
        measured.selection_bytes - measured.base_bytes - measured.score_bytes,
    )


def lora_step(model: nn.Module, values: int, size: int, length: int, checkpointing: bool) -> Step:
    """LoRA with the same number of values on the same layers, in float32."""
    config = LoraConfig(r=equal_rank(model, values), target_modules=list(linears(model)))
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    try:
        measured = step_memory(adapted, tokens, size, length, checkpointing)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    finally:
        adapted.unload()
    return Step(
        4 * count, measured.gradients, 8 * count, measured.activations, 4 * count, count, measured.most_activations
    )


def full_step(model: nn.Module, size: int, length: int, checkpointing: bool) -> Step:
    """Full fine-tuning in mixed precision: bfloat16 weights and gradients, float32 master weights and states."""
    model.requires_grad_(True)
    try:
        measured = step_memory(model, tokens, size, length, checkpointing)
    finally:
        model.requires_grad_(False)
    count = sum(p.numel() for p in model.parameters())
    return Step(
        4 * count, measured.gradients, 8 * count, measured.activations, 2 * count, count, measured.most_activations
    )


def tokens(size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.ones(size, length, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def largest_batch(room: float, peaks: Mapping[int, float]) -> int:
    """The largest batch that fits. Memory at each moment of a step is linear in the batch size, so the peak is the
    maximum of lines: those through the known sizes 2 and 3, and 64 and 65."""
    first, second, third, fourth = sorted(peaks)
    fits = []
    for size, following in ((first, second), (third, fourth)):
        slope = (peaks[following] - peaks[size]) / (following - size)
        fits.append(math.floor(size + (room - peaks[size]) / slope) if slope else math.inf)
    return max(0, min(fits))


def shard_bytes(standing: float, block: float, activations: float, devices: int) -> float:
    """Bytes per device under FSDP: a shard of permanent memory, two gathered blocks (one prefetched), activations."""
    return standing / devices + 2 * block + activations


# Tables -------------------------------------------------------------------------------------------


def measure(config: PretrainedConfig) -> dict[str, Any]:
    model = on_paper(config)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    result: dict[str, Any] = {
        "base": {p: base_bytes(model, p) for p in SHARES},
        "block": block,
        "steps": {},
        "peaks": {},
    }
    result["largest_weight"] = max(layer.weight.nbytes for layer in linears(model).values())
    for checkpointing in (False, True):
        sizes = {size: fggm_step(model, size, LENGTH, checkpointing) for size in SIZES}
        steps = {
            "FGGM": sizes[2],
            "LoRA": lora_step(model, sizes[2].count, 2, LENGTH, checkpointing),
            "full": full_step(model, 2, LENGTH, checkpointing),
        }
        key = "checkpointing" if checkpointing else "plain"
        result["steps"][key] = {name: vars(step) for name, step in steps.items()}
        result["peaks"][key] = {size: step.beside_the_base for size, step in sizes.items()}
        result["activations"] = {size: step.most_activations for size, step in sizes.items()}
    values = steps["FGGM"].count
    result["rank"] = equal_rank(model, values)
    result["scores"] = {name: score_bytes(model, name) for name in GRANULARITIES}
    result["selection_multiple"] = {length: selection_multiple(model, length) for length in (128, 512, 2048)}
    return result


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 20 else f"{size / GIB:.4f}"


def beside(step: dict[str, int]) -> int:
    return Step(**step).beside_the_base


def numbered(sizes: Mapping[str, int]) -> dict[int, int]:
    """The JSON keys as integers."""
    return {int(size): value for size, value in sizes.items()}


def rows_of(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parts_table(results: dict[str, Any]) -> str:
    rows = []
    for name, measured in results.items():
        for kind, steps in measured["steps"].items():
            for method, step in steps.items():
                parts = [step[part] for part in ("values", "gradients", "optimizer", "activations")]
                total = measured["base"]["bf16"] + beside(step)
                label = f"{method}, r = {measured['rank']}" if method == "LoRA" else method
                rows.append([name, kind, label, *map(gib, (measured["base"]["bf16"], *parts, total))])
    header = ["model", "activations", "method", "weights", "values", "gradients", "optimizer", "activations", "sum"]
    return rows_of(header, rows)


def selection_table(results: dict[str, Any]) -> str:
    rows = []
    for name, measured in results.items():
        for kind, steps in measured["steps"].items():
            peaks = [
                measured["base"][p] + steps["FGGM"]["most_activations"] + measured["scores"]["row"] for p in SHARES
            ]
            rows.append([name, kind, *map(gib, (*peaks, *measured["scores"].values()))])
    header = ["model", "activations", *(f"peak, {p} base" for p in SHARES)]
    return rows_of([*header, "scores of rows", "of columns", "of elements"], rows)


def fits_table(results: dict[str, Any]) -> str:
    rows = []
    for name, measured in results.items():
        for precision in SHARES:
            cells = []
            for peaks in measured["peaks"].values():
                for device in DEVICES:
                    room = device * GIB - CONTEXT - measured["base"][precision]
                    cells.append(str(largest_batch(room, numbered(peaks)) or "–"))
            rows.append([name, precision, gib(measured["base"][precision]), *cells])
    heads = [f"{device} GiB{tail}" for tail in ("", ", checkpointing") for device in DEVICES]
    return rows_of(["model", "base", "weights", *heads], rows)


def sharded_table(results: dict[str, Any]) -> str:
    """Permanent memory and gradients are sharded, so a device's peak is at its maximum of activations."""
    measured, rows = results["70 B"], []
    step = measured["steps"]["checkpointing"]["FGGM"]
    standing = measured["base"]["bf16"] + step["values"] + step["optimizer"] + 4 * step["count"]
    sizes = numbered(measured["activations"])
    for devices in (2, 4, 8, 16):
        peaks = {
            size: shard_bytes(standing, measured["block"], activations, devices) for size, activations in sizes.items()
        }
        cells = [str(largest_batch(device * GIB - CONTEXT, peaks) or "–") for device in DEVICES[1:]]
        rows.append([str(devices), gib(standing / devices), gib(2 * measured["block"]), *cells])
    return rows_of(
        ["devices", "share of permanent memory", "two blocks", *(f"{d} GiB each" for d in DEVICES[1:])], rows
    )


def operations_table(results: dict[str, Any]) -> str:
    rows = []
    for checkpointing in (False, True):
        multiples = [training_multiple(method, DENSITY, checkpointing) for method in ("FGGM", "LoRA", "full")]
        name = "a training step" + (", checkpointing" if checkpointing else "")
        rows.append([name, *(f"{multiple:.2f}" for multiple in multiples)])
    for name, measured in results.items():
        for length, multiple in measured["selection_multiple"].items():
            rows.append([f"a selection pass of {name}, {length} tokens", f"{multiple:.2f}", "", ""])
    return rows_of(["", "FGGM", "LoRA", "full"], rows)


def file_table(results: dict[str, Any]) -> str:
    rows = []
    for name, measured in results.items():
        steps = measured["steps"]["plain"]
        values = steps["FGGM"]["count"]
        sizes = [steps["FGGM"]["file"], 2 * values, steps["LoRA"]["file"], steps["full"]["file"]]
        rows.append([name, f"{values:,}", *map(gib, sizes)])
    return rows_of(["model", "values", "FGGM, float32", "FGGM, bfloat16", "LoRA, float32", "whole model"], rows)


TABLES = {
    "parts": parts_table,
    "selection": selection_table,
    "fits": fits_table,
    "sharded": sharded_table,
    "operations": operations_table,
    "files": file_table,
}


def with_tables(page: str, results: dict[str, Any]) -> str:
    """The page with all tables between their marks replaced."""
    for name, table in TABLES.items():
        mark = f"<!-- table: {name} -->"
        page = re.sub(rf"{mark}\n.*?(?=\n\n)", lambda _, m=mark, t=table: f"{m}\n{t(results)}", page, flags=re.DOTALL)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="write only the tables, from the result file")
    if not parser.parse_args().tables:
        write("scaling", {name: measure(config) for name, config in tqdm(MODELS.items(), desc="models", disable=None)})
    results = json.loads((RESULTS / "scaling.json").read_text())["results"]
    PAGE.write_text(with_tables(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
