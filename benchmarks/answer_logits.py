"""What the logits of prompts cost: a step with the logits of all tokens, and one with those of answers only.

python benchmarks/answer_logits.py

The model has the shape of SmolLM2-135M and random weights, in float32 and for one method also in bfloat16. A batch has
8 prompts with answers of 16 tokens. Time is the step's (forward, backward, AdamW) over that of the step with all
logits, and memory is the peak of forward and backward, without the model. Both steps have the same loss
(tests/training/test_answer_loss.py).
"""

from __future__ import annotations

from functools import partial

import torch
from common import batches, interleaved, peak_mib, ratios, show, write
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.selection.likelihood import IGNORED
from fggm_peft.training.answer_loss import answers_only

BATCH_SIZE, ANSWER, PROMPTS, ROUNDS = 8, 16, (48, 112), 3
VOCABULARY = 49152
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
FGGM = {"granularity": "column", "density": 0.3, "num_samples": 8, "task_type": "CAUSAL_LM"}
METHODS = {
    "fggm": (FGGMConfig(**FGGM), torch.float32),
    "fggm, bfloat16": (FGGMConfig(**FGGM), torch.bfloat16),
    "lora": (LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"), torch.float32),
    "full fine-tuning": (None, torch.float32),
}


def adapted(config, dtype: torch.dtype, batch) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False)).to(dtype)
    if config is None:
        return model.train()
    model = get_peft_model(model, config)
    if isinstance(config, FGGMConfig):
        select_parameters(model, [batch], progress=False)
    return model.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, (config, dtype) in METHODS.items():
        model = adapted(config, dtype, batches(1, BATCH_SIZE, 32, VOCABULARY)[0])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
        for prompt in PROMPTS:
            (batch,) = batches(1, BATCH_SIZE, prompt + ANSWER, VOCABULARY)
            batch["labels"][:, :prompt] = IGNORED
            steps = {"all": partial(step, model, optimizer, batch)}
            steps["answers"] = partial(step, model, optimizer, answers_only(model, batch))
            rows = ratios(interleaved(steps, ROUNDS), "all")
            for kind, call in steps.items():
                rows[kind]["peak_mib"] = peak_mib(call)
            results[f"{name}, prompts of {prompt}"] = rows
            show(f"{name}, prompts of {prompt} tokens", rows)
    write("answer_logits", results)


if __name__ == "__main__":
    main()
