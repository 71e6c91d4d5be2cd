"""Synthetic results in the format of ``run_stream``, for tests of reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fggm_peft.continual.measures import measures_of

TASKS = ("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten")
METHODS = {
    # label: (method, learns, forgets, harms)
    "fggm": ("fggm", 0.36, 0.03, 0.02),
    "fggm-5%": ("fggm", 0.33, 0.015, 0.01),
    "shira": ("shira", 0.36, 0.04, 0.04),
    "sft": ("sft", 0.40, 0.22, 0.45),
    "frozen": ("frozen", 0.0, 0.0, 0.0),
    "multitask": ("multitask", 0.38, 0.0, 0.2),
    "lora": ("lora", 0.37, 0.18, 0.25),
    "o_lora": ("o_lora", 0.33, 0.08, 0.12),
    "migu": ("migu", 0.34, 0.10, 0.15),
    "ewc": ("ewc", 0.33, 0.09, 0.18),
    "replay": ("replay", 0.37, 0.05, 0.2),
    "osf": ("osf", 0.35, 0.06, 0.05),
}


def made_up_runs(
    methods: dict[str, tuple[str, float, float, float]] = METHODS,
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = (0, 1, 2),
    orders: Sequence[str] = ("given", "reversed"),
    rates: Sequence[float] = (1e-4, 3e-4),
) -> list[dict[str, Any]]:
    """One deterministic result for each label, seed, order and learning rate."""
    return [
        made_up_run(label, *methods[label], seed, order, rate, tasks if order == "given" else tasks[::-1])
        for seed in seeds
        for order in orders
        for rate in rates
        for label in methods
    ]


def made_up_run(label, method, learns, forgets, harms, seed, order, rate, tasks) -> dict[str, Any]:
    random = np.random.default_rng([seed, len(order), round(rate * 1e6), *label.encode()])
    pace, count = (rate / 3e-4) ** 0.3, len(tasks)
    zero_shot = [0.1 + 0.04 * (len(name) % 5) for name in tasks]
    # noise that all methods share for a seed and order
    shared = np.random.default_rng([seed, len(order)]).normal(0, 0.015, count)
    scores = np.full((count, count), math.nan)
    for t in range(count):
        for j in range(count if t == count - 1 else min(t + 2, count)):
            left = learns * pace * (1 if j <= t else 0.05) - forgets * pace**2 * max(0, t - j) / count * 2
            noise = (random.normal(0, 0.012) + shared[j]) if learns else 0
            scores[t, j] = min(1, max(0, zero_shot[j] + left + noise))
    rows = [[None if math.isnan(value) else float(value) for value in row] for row in scores]
    if method == "multitask":
        rows = rows[-1:]
    steps = len(rows) + 1
    losses = [2.8 + harms * pace * n / count + (random.normal(0, 0.005) if n and harms else 0) for n in range(steps)]
    trains, selects = method != "frozen", method == "fggm"
    return {
        "method": method,
        "label": label,
        "learning_rate": rate,
        "seed": seed,
        "order": order,
        "task_count": len(tasks),
        "tasks": list(tasks),
        "R": rows,
        "zero_shot": zero_shot,
        "general_losses": losses,
        **measures_of(rows, zero_shot, losses),
        "cost": {
            "selection_seconds": 31.0 + random.random() if selects else 0.0,
            "training_seconds": 640.0 + 20 * random.random() if trains else 0.0,
            "evaluation_seconds": 210.0 + 5 * random.random(),
            "bytes": {"fggm": 22_000_000, "lora": 9_000_000}.get(method, 0),
            "parameters": {"frozen": 0, "lora": 2_300_000, "fggm": 5_400_000}.get(method, 134_515_008),
            "peak_memory": 3.4e9 if trains else 1.2e9,
        },
        "gate": None,
    }
