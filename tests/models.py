"""Small models, batches and quantized copies that several test modules share."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fggm_peft import FGGMConfig, FGGMLayer
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.tuner.target import find_targets

VOCABULARY = 50


def llama(dtype: torch.dtype = torch.float32, layers: int = 2, vocab: int = VOCABULARY, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, **{**settings, **config})).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


def bert(head: type, **config) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return head(BertConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 32} | sizes | config))


def mixture(name: str, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> nn.Module:
    """A causal language model with two layers of four experts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
    special = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
        "GptOss": {"num_local_experts": 4, "head_dim": 8},
        "Llama4": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 24, "num_experts_per_tok": 1},
        "DeepseekV3": {
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": 4,
        }
        | {"first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    }
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(sizes | special[name]))).to(dtype)
    if name != "Llama4":
        model.set_experts_implementation(implementation)
    with torch.no_grad():  # some architectures start with zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.1)
    return model


BERT_HEADS = {
    "sequence": BertForSequenceClassification,
    "token": BertForTokenClassification,
    "masked": BertForMaskedLM,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 258 tokens: id 0 is padding, id 1 ends a text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *sorted(alphabet)])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def text_model(**config) -> LlamaForCausalLM:
    """A small Llama for ``byte_tokenizer``."""
    model = llama(vocab=258, max_position_embeddings=1024, **config)
    for settings in (model.config, model.generation_config):
        settings.pad_token_id, settings.eos_token_id = 0, 1
    return model


def token_batches(sizes=(3, 2, 3), length: int = 9, padding: str = "left", seed: int = 0) -> list[dict]:
    """Batches of unequal size and length, with different padding for each sample; prompt tokens have no loss."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for number, size in enumerate(sizes):
        width = length - number
        ids = torch.randint(1, VOCABULARY, (size, width), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(size):
            pad = (row + number) % 3
            where = slice(0, pad) if padding == "left" else slice(width - pad, width)
            mask[row, where] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : width // 3] = -100
        batches.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return batches


def train(model: nn.Module, batches: list[dict], steps: int = 4, lr: float = 1e-2) -> list[float]:
    """A few steps of AdamW on all trainable parameters; returns the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def logits(model: nn.Module, batch: dict) -> torch.Tensor:
    model.eval()
    return model(**batch).logits


QUANTIZATIONS = ("nf4", "nf4 double", "fp4", "int8")


def quantized_layer(layer: nn.Linear, kind: str, device: str = "cpu") -> nn.Module:
    """The layer as a bitsandbytes layer, quantized on ``device``."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    bias = layer.bias is not None
    if kind == "int8":
        result = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, bias, has_fp16_weights=False)
    else:
        result = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias,
            compute_dtype=torch.float32,
            quant_type=kind.split()[0],
            compress_statistics=kind.endswith("double"),
        )
    result.load_state_dict(layer.state_dict())
    return result.to(device).requires_grad_(False)


def quantized(model: nn.Module, kind: str, device: str = "cpu") -> nn.Module:
    """Quantize every linear layer except the head, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized_layer(module, kind, device))
    return model.to(device)


class Twice(nn.Module):
    """A model that calls one layer twice in a forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids, **_):
        hidden = torch.tanh(self.shared(self.embed(input_ids)))
        return self.head(torch.relu_(self.shared(hidden))).mean(1)


def class_log_likelihood(model, batch):
    return -nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


def class_batches():
    batches = token_batches()
    for batch in batches:
        batch["labels"] = torch.arange(len(batch["input_ids"])) % 4
    return batches


def fggm_layers(model: nn.Module, adapter_name: str) -> dict[str, FGGMLayer]:
    """Module path -> layer, of the layers that have the adapter."""
    return {path: target.layer for path, target in find_targets(model, adapter_name).items()}


def adapted(model: nn.Module, granularity: str = "row", **config) -> nn.Module:
    return get_peft_model(model, FGGMConfig(granularity=granularity, **config))


def fisher_scores(model: nn.Module, batches, log_likelihood=None) -> dict[str, torch.Tensor]:
    """Module path -> Fisher information collected by a pass, mean over samples, ``[units]``."""
    targets = find_targets(model, "default")
    totals = DataPass(model, model.peft_config["default"], batches, log_likelihood).run(targets)
    return {path: totals.mean(path, "fisher") for path in targets}


def trace(model):
    """All state that a selection must not change."""
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.random.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        model.config.use_cache,
        [layer.scaling["default"] for layer in fggm_layers(model, "default").values()],
    )
