"""Cases for PEFT's own tests: the same models and targets for FGGM, LoRA and SHiRA."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, ShiraConfig

from fggm_peft import FGGMConfig

# (case, PEFT's name of a small model, its targets)
_TARGETS: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"]}),
    ("Conv2d 1", "Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d 2", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Embedding and Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding and Conv1D 2", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding and Conv1D 3", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
]
_GRANULARITIES = ("row", "column", "element")


def _fggm(granularity: str) -> dict[str, Any]:
    return {"criterion": "random", "granularity": granularity, "density": 0.4}


TEST_CASES = {
    "fggm": [
        (f"{name} {granularity}", model, FGGMConfig, {**targets, **_fggm(granularity)})
        for granularity in _GRANULARITIES
        for name, model, targets in _TARGETS
    ],
    "lora": [(name, model, LoraConfig, targets) for name, model, targets in _TARGETS],
    # SHiRA supports only linear layers
    "shira": [(name, model, ShiraConfig, {"r": 1, **targets}) for name, model, targets in _TARGETS if model == "MLP"],
}

_ONE = {"target_modules": ["lin0"], "init_weights": False}
_BOTH = {"target_modules": ["lin0", "lin1"], "init_weights": False}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = {
    "fggm": [
        (
            f"FGGM {kind} {granularity}",
            "fggm",
            FGGMConfig,
            {**first, **_fggm(granularity)},
            {**second, **_fggm(granularity), "seed": 1},
        )
        for granularity in _GRANULARITIES
        for kind, first, second in (("same", _ONE, _ONE), ("different", _ONE, _BOTH))
    ],
    "lora": [
        (
            "LoRA same",
            "lora",
            LoraConfig,
            {"target_modules": ["lin0"], "init_lora_weights": False},
            {"target_modules": ["lin0"], "init_lora_weights": False},
        ),
        (
            "LoRA different",
            "lora",
            LoraConfig,
            {"target_modules": ["lin0"], "init_lora_weights": False},
            {"target_modules": ["lin1"], "init_lora_weights": False},
        ),
    ],
    "shira": [
        (f"SHiRA {kind}", "shira", ShiraConfig, {"r": 1, **first}, {"r": 1, **second})
        for kind, first, second in (("same", _ONE, _ONE), ("different", _ONE, _BOTH))
    ],
}

_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
QUANTIZATION_TEST_CASES = {
    "fggm": [
        (FGGMConfig, {**_ATTENTION, "criterion": "random", "granularity": granularity, "density": 0.05})
        for granularity in _GRANULARITIES
    ],
    "lora": [(LoraConfig, _ATTENTION)],
    "shira": [(ShiraConfig, {"r": 8, "random_seed": 42, **_ATTENTION})],
}
