"""Evaluates a causal language model on answers: loss and token accuracy, and exact match of generated answers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..selection.likelihood import IGNORED, takes_positions
from ..selection.processes import Processes
from ..tuner.hosts.bitsandbytes import guard_four_bit_layers
from .data import TokenizedExamples, padding_on_the_right

SIMILAR = 0.75  # the smallest length in a batch, as a share of the largest


@dataclass(frozen=True)
class AnswerScores:
    """Results of an evaluation, over all samples together, so they do not depend on the batches.

    Args:
        samples: number of examples.
        tokens: number of answer tokens, including end tokens.
        loss: mean negative log-likelihood of these tokens, in nats.
        accuracy: share of these tokens that were the most likely token, given the true tokens before them.
        exact_match: share of the answers that greedy decoding generates exactly; None if it was not requested.
    """

    samples: int
    tokens: int
    loss: float
    accuracy: float
    exact_match: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def score_answers(
    model: nn.Module,
    examples: TokenizedExamples,
    batch_size: int = 8,
    description: str = "Evaluating",
    processes: Processes | None = None,
) -> AnswerScores:
    """Loss and accuracy on the answers, equal for every batch size up to rounding. Leaves the model in eval mode.

    Args:
        processes: share the batches. Each of them must call this function, and gets the scores of all.
    """
    model.eval()
    guard_four_bit_layers(model)
    collate = padding_on_the_right(examples.tokenizer)
    parts = []
    for indices in _batches(examples, batch_size, description, processes):
        batch = collate([examples[index] for index in indices]).to(next(model.parameters()).device)
        logits, targets = _answer_logits(model, batch)
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        parts.append((float(losses.double().sum()), int((logits.argmax(-1) == targets).sum()), len(targets)))
    loss, correct, tokens = map(math.fsum, zip(*_of_all(processes, parts), strict=True))
    return AnswerScores(len(examples), int(tokens), loss / tokens, correct / tokens)


@torch.no_grad()
def written_answers(
    model: Any,
    examples: TokenizedExamples,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    description: str = "Generating",
    processes: Processes | None = None,
) -> list[str]:
    """The answers that greedy decoding generates, in the order of the examples. Leaves the model in eval mode.

    Args:
        processes: share the batches. Each of them must call this function, and gets the answers of all.
    """
    model.eval()
    guard_four_bit_layers(model)
    tokenizer = examples.tokenizer
    texts: list[tuple[int, str]] = []
    for indices in _batches(examples, batch_size, description, processes):
        prompts = [_prompt_and_answer(examples[index])[0] for index in indices]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        batch = batch.to(next(model.parameters()).device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with _greedy_decoding(model, tokenizer):
            sequences = model.generate(**inputs, max_new_tokens=max_new_tokens)
        answers = sequences[:, batch["input_ids"].shape[1] :]
        texts += zip(indices, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True)
    return [text for _, text in sorted(_of_all(processes, texts))]


def exact_match(
    model: Any, examples: TokenizedExamples, batch_size: int = 8, max_new_tokens: int = 64, **options
) -> float:
    """Share of the answers that greedy decoding generates. Spaces around an answer are ignored."""
    parts = [examples.parts(example) for example in examples.examples]
    kept = [len(examples.truncate(*each)[1]) for each in parts]
    answers, end = [answer for *_, answer in parts], examples.tokenizer.eos_token_id
    lengths = [answer.index(end) if end in answer else len(answer) for answer in answers]
    if too_long := sum(length > min(max_new_tokens, room) for length, room in zip(lengths, kept, strict=True)):
        warnings.warn(
            f"{too_long} of {len(answers)} answers can never match exactly: they have more than "
            f"max_new_tokens={max_new_tokens} tokens, or are truncated to max_length={examples.max_length}",
            stacklevel=2,
        )
    generated = written_answers(model, examples, batch_size, max_new_tokens, **options)
    expected = examples.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(text.strip() == answer.strip() for text, answer in zip(generated, expected, strict=True)) / len(examples)


@contextmanager
def _greedy_decoding(model: Any, tokenizer: Any) -> Iterator[None]:
    """Replace the generation config of the base, which may contain penalties, forced tokens and a type of output."""
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
    base.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)
    try:
        yield
    finally:
        base.generation_config = config


def _of_all(processes: Processes | None, results: list[Any]) -> list[Any]:
    """The results of all processes."""
    return results if processes is None else [result for part in processes.gather(results) for result in part]


def _batches(
    examples: TokenizedExamples, batch_size: int, description: str, processes: Processes | None
) -> Iterator[list[int]]:
    """Indices of examples of similar length. The longest come first, so that a lack of memory shows at once.

    With n processes each gets every n-th batch. The batches are the same for every n.
    """
    lengths = [len(examples[index]["input_ids"]) for index in range(len(examples))]
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and len(batches[-1]) < batch_size and lengths[index] >= SIMILAR * lengths[batches[-1][0]]:
            batches[-1].append(index)
        else:
            batches.append([index])
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    yield from tqdm(batches[rank::size], desc=description, unit="batch", disable=None, leave=False)


def _answer_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, float32 ``[n, vocabulary]``, and targets, int64 ``[n]``, of the ``n`` answer tokens of a batch."""
    targets = batch["labels"][:, 1:]
    counted = targets != IGNORED
    positions = counted.any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    # the logits of a long prompt would need more memory than the rest of the forward pass
    keep = {"logits_to_keep": positions} if takes_positions(model) else {}
    logits = model(**inputs, **keep).logits
    if logits.shape[1] > len(positions):  # unsloth's models ignore positions
        logits = logits[:, positions]
    return logits[counted[:, positions]].float(), targets[counted]


def _prompt_and_answer(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    length = sum(label == IGNORED for label in row["labels"])
    if not length:
        raise ValueError("written answers need prompts, but these examples are plain text")
    return row["input_ids"][:length], row["input_ids"][length:]
