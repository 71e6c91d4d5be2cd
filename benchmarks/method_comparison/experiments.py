"""FGGM's experiments for PEFT's method comparison on MetaMathQA: writes the folders under ``experiments/fggm``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fggm_peft import FGGMConfig, ParameterBudget

FOLDER = Path(__file__).parent / "experiments" / "fggm"
# Llama-3.2-3B: 28 layers, PEFT's LoRA adapts q_proj (3072 to 3072) and v_proj (3072 to 1024) by default
LORA_RANK_32 = 28 * 32 * ((3072 + 3072) + (3072 + 1024))
LIKE_FULL_FINE_TUNING = {"optimizer_kwargs": {"lr": 1e-5}}
LIKE_SHIRA = {"optimizer_kwargs": {"lr": 3e-4}}


@dataclass(frozen=True)
class Experiment:
    """The content of one folder.

    Args:
        config: fields of the FGGMConfig that differ from its defaults.
        training: differences from PEFT's ``default_training_params.json``.
    """

    config: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)

    def adapter_config(self) -> FGGMConfig:
        return FGGMConfig(task_type="CAUSAL_LM", target_modules="all-linear", **self.config)


EXPERIMENTS = {
    "llama-3.2-3B-rows-30": Experiment({"granularity": "row", "density": 0.3}, LIKE_FULL_FINE_TUNING),
    "llama-3.2-3B-columns-30": Experiment({"granularity": "column", "density": 0.3}, LIKE_FULL_FINE_TUNING),
    "llama-3.2-3B-rows-as-lora-rank32": Experiment(
        {"granularity": "row", "threshold": ParameterBudget(LORA_RANK_32)}, LIKE_SHIRA
    ),
    # scores of all elements would take 21 GiB
    "llama-3.2-3B-elements-1": Experiment(
        {"granularity": "element", "density": 0.01, "score_memory": "12GiB"}, LIKE_SHIRA
    ),
}


def write_experiments(folder: Path) -> None:
    """Each experiment's ``adapter_config.json``, and ``training_params.json`` if it has its own."""
    for name, experiment in EXPERIMENTS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        experiment.adapter_config().save_pretrained(str(folder / name))
        if experiment.training:
            (folder / name / "training_params.json").write_text(json.dumps(experiment.training, indent=2) + "\n")


if __name__ == "__main__":
    write_experiments(FOLDER)
