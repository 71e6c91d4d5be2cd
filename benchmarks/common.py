"""Shared by the benchmarks: interleaved timing, a description of the machine, result files and tables."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 32000  # Llama's
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama(hidden: int, layers: int, dtype: torch.dtype = torch.float32, vocab: int = VOCABULARY) -> LlamaForCausalLM:
    """A randomly initialized Llama with the usual proportions, created on ``DEVICE``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        use_cache=False,
    )
    with DEVICE:
        return LlamaForCausalLM(config).to(dtype).eval()


def clock() -> float:
    """Seconds: CPU time of a process with one thread, which other processes disturb less; otherwise wall-clock time.

    On a CUDA device, wall-clock time after all submitted work has finished.
    """
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection, which would free memory of earlier calls and take time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def peak_mib(call: Callable[[], Any]) -> float:
    """Peak memory that torch allocates on ``DEVICE`` during a call, without what was allocated before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with without_collection():
            call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with without_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    live = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


def batches(count: int, size: int, length: int, vocab: int = VOCABULARY) -> list[dict[str, torch.Tensor]]:
    """Random token batches on ``DEVICE`` without padding; every token has a label."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        ids = torch.randint(0, vocab, (size, length), generator=generator).to(DEVICE)
        result.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return result


def interleaved(variants: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call of each variant, in turns, so that disturbances affect all variants alike.

    If a call returns a float, that is its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.freeze()  # a collection then takes microseconds: it reads only what the calls have created
    try:
        for round_number in tqdm(range(warm_up + repeats), desc="rounds", disable=None):
            for name, call in variants.items():
                gc.collect()
                with without_collection():
                    start = clock()
                    own = call()
                    elapsed = own if isinstance(own, float) else clock() - start
                if round_number >= warm_up:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return seconds


def ratios(seconds: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Minimum and median of each variant over those of ``floor``; noise is the floor's median over its minimum."""
    base_min, base_median = min(seconds[floor]), statistics.median(seconds[floor])
    return {
        name: {
            "seconds": min(times),
            "ratio_min": min(times) / base_min,
            "ratio_median": statistics.median(times) / base_median,
        }
        for name, times in seconds.items()
    } | {"noise": {"floor_median_over_min": base_median / base_min}}


def machine() -> dict[str, Any]:
    """The machine and the package versions of a measurement."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = (
        "torch",
        "peft",
        "transformers",
        "bitsandbytes",
        "opacus",
        "backpack-for-pytorch",
        "fggm-peft",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time" if torch.get_num_threads() == 1 and DEVICE.type == "cpu" else "wall time",
        "cuda": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(name: str, results: Any) -> Path:
    """Write a result file with a description of the machine."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table with a row for each variant."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table(title=title)
    table.add_column("variant")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[c]:.3f}" if c in row else "" for c in columns))
    Console(width=140).print(table)
