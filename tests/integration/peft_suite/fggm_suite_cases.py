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
_KINDS = ("row", "column", "element")


def _fggm(granularity: str) -> dict[str, Any]:
    return {"criterion": "random", "granularity": granularity, "density": 0.4}


TEST_CASES = {
    **{
        kind: [(name, model, FGGMConfig, {**options, **_fggm(kind)}) for name, model, options in _TARGETS]
        for kind in _KINDS
    },
    "lora": [(name, model, LoraConfig, targets) for name, model, targets in _TARGETS],
    # SHiRA supports only linear layers
    "shira": [(name, model, ShiraConfig, {"r": 1, **targets}) for name, model, targets in _TARGETS if model == "MLP"],
}

_ONE = {"target_modules": ["lin0"]}
_OTHER = {"target_modules": ["lin1"]}
_BOTH = {"target_modules": ["lin0", "lin1"]}


def _pairs(method: str, config_class: type, second: dict[str, Any], **options: Any) -> list[tuple]:
    """Two adapters on the same and on different modules."""
    others = {"seed": 1} if method == "fggm" else {}
    return [
        (f"{method} {kind}", method, config_class, {**_ONE, **options}, {**targets, **options, **others})
        for kind, targets in (("same", _ONE), ("different", second))
    ]


MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = {
    **{kind: _pairs("fggm", FGGMConfig, _BOTH, init_weights=False, **_fggm(kind)) for kind in _KINDS},
    "lora": _pairs("lora", LoraConfig, _OTHER, init_lora_weights=False),
    "shira": _pairs("shira", ShiraConfig, _BOTH, init_weights=False, r=1),
}

ALL_CONFIG_CLASSES = {**{kind: ((FGGMConfig, {"granularity": kind}),) for kind in _KINDS}, "lora": ((LoraConfig, {}),)}

_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
QUANTIZATION_TEST_CASES = {
    **{
        kind: [(FGGMConfig, {**_ATTENTION, "criterion": "random", "granularity": kind, "density": 0.05})]
        for kind in _KINDS
    },
    "lora": [(LoraConfig, _ATTENTION)],
    "shira": [(ShiraConfig, {"r": 8, "random_seed": 42, **_ATTENTION})],
}
