"""Replacements for names in PEFT's tests, so that tests written for LoRA or LoKr test FGGM."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import OPTConfig, OPTForCausalLM

from fggm_peft import FGGMConfig, FGGMLayer

_COPIED = ("target_modules", "modules_to_save", "task_type", "bias")


class DrawnConfig(FGGMConfig):
    """Draws its seed from torch's generator when an adapter is created, as LoRA draws its values."""

    @property
    def is_chosen_without_data(self) -> bool:
        self.seed = int(torch.randint(2**31, ()))
        return super().is_chosen_without_data


class StandIns:
    """What replaces a name in the tests.

    Args:
        method: FGGM's granularity, or a method of PEFT.
    """

    def __init__(self, method: str):
        self.method = method

    def config(self, **kwargs: Any) -> FGGMConfig:
        """An FGGM config in place of a LoRA or LoKr config; a higher rank becomes a higher density."""
        zero = kwargs.get("init_lora_weights", kwargs.get("init_weights", True))
        options = {key: kwargs[key] for key in _COPIED if key in kwargs}
        options["bias"] = "all" if options.get("bias") == "all" else "none"
        density = min(1.0, 0.03 * kwargs.get("r", 8))
        return DrawnConfig(
            criterion="random", granularity=self.method, density=density, init_weights=bool(zero), **options
        )

    def attention_config(self, **kwargs: Any) -> FGGMConfig:
        """Like ``config``, with PEFT's default targets for OPT."""
        return self.config(**{"target_modules": ["q_proj", "v_proj"], **kwargs})


class AutoModelForCausalLM:
    """Like transformers' class, but returns a small OPT with random weights for a Hub id."""

    @staticmethod
    def from_pretrained(name: Any, **kwargs: Any):
        return Auto.from_pretrained(name if Path(name).exists() else _small_opt(), **kwargs)


class AutoModelOfTwelveLayers:
    """Always returns a small OPT with the depth of opt-125m and widths that bitsandbytes can repack."""

    @staticmethod
    def from_pretrained(name: Any, **kwargs: Any):
        return Auto.from_pretrained(_small_opt(layers=12, width=64, ffn_dim=128, vocab_size=1000), **kwargs)


@functools.cache
def _small_opt(layers: int = 5, width: int = 16, **config: int) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "ffn_dim": 4, "num_hidden_layers": layers, "num_attention_heads": 4}
    folder = tempfile.mkdtemp()
    OPTForCausalLM(OPTConfig(word_embed_proj_dim=width, **{**sizes, **config})).save_pretrained(folder)
    return folder


StandIns.AutoModelForCausalLM = AutoModelForCausalLM
StandIns.AutoModelOfTwelveLayers = AutoModelOfTwelveLayers
StandIns.FGGMLayer = FGGMLayer
