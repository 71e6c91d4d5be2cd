"""Batches of examples, and how well a model answers them (teacher forcing, no generation).

An answer is an exact match when each of its tokens, the end token included, is the most likely
one given the true tokens before it: greedy decoding would then write exactly this answer.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from tasks import Example
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class ExampleScores:
    """One figure an example, in the order of the examples."""

    exact_match: list[float]
    token_accuracy: list[float]
    loss: list[float]
    """Mean negative log-likelihood of the answer's tokens, in nats."""


@dataclass(frozen=True)
class Encoder:
    """Turns examples into padded batches of ``input_ids``, ``attention_mask`` and ``labels``."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of the prompt (with the model's start token, if it has one) and the answer."""
        prompt = self.tokenizer(example.prompt)["input_ids"] if example.prompt else []
        answer = self.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return prompt, [*answer, end] if example.ends and end is not None else answer

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One right-padded batch; labels are -100 except on the answers."""
        rows = [self.encode(example) for example in examples]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, NO_LOSS)
        for row, (prompt, answer) in enumerate(rows):
            stop = len(prompt) + len(answer)
            input_ids[row, :stop] = torch.tensor(prompt + answer)
            attention_mask[row, :stop] = 1
            labels[row, len(prompt) : stop] = torch.tensor(answer)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def training_loader(self, examples: list[Example], batch_size: int, seed: int) -> DataLoader:
        """Each example once, in a shuffled order that puts similar lengths into one batch."""
        rng = random.Random(seed)
        order = rng.sample(range(len(examples)), len(examples))
        window = 4 * batch_size  # sorting within four batches keeps them mixed and little padded
        batches = []
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=self._length_of(examples))
            batches += [by_length[i : i + batch_size] for i in range(0, window, batch_size)]
        batches = [batch for batch in batches if batch]
        rng.shuffle(batches)
        return DataLoader(examples, batch_sampler=batches, collate_fn=self.collate)

    def evaluation_batches(self, examples: list[Example], batch_size: int = 8) -> Iterator[tuple[list[int], Batch]]:
        """Batches sorted by length, with the positions of their examples."""
        order = sorted(range(len(examples)), key=self._length_of(examples))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, self.collate([examples[i] for i in chosen])

    def _length_of(self, examples: list[Example]):
        return lambda i: sum(map(len, self.encode(examples[i])))


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets at the positions where any row of the batch has a label.

    Returns:
        float32 ``[b, t, vocabulary]`` and int64 ``[b, t]``; a target is -100 where there is none.
    """
    targets = batch["labels"][:, 1:]
    positions = (targets != NO_LOSS).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        # The head is a third of a small model's work: ask only for what is looked at.
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, positions]
    return logits.float(), targets[:, positions]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of all answer tokens of a batch."""
    logits, targets = answer_logits(model, batch)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[Example], encoder: Encoder) -> ExampleScores:
    """Score every example; leaves the model in eval mode."""
    model.eval()
    exact, accuracy, loss = ([0.0] * len(examples) for _ in range(3))
    for chosen, batch in encoder.evaluation_batches(examples):
        logits, targets = answer_logits(model, batch)
        token_losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        is_answer = targets != NO_LOSS
        correct = (logits.argmax(-1) == targets) & is_answer
        lengths = is_answer.sum(1)
        for row, i in enumerate(chosen):
            exact[i] = float(correct[row].sum() == lengths[row])
            accuracy[i] = (correct[row].sum() / lengths[row]).item()
            loss[i] = (token_losses[row].sum() / lengths[row]).item()
    return ExampleScores(exact_match=exact, token_accuracy=accuracy, loss=loss)
