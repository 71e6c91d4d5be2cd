"""How well a causal language model answers: loss and accuracy given the true tokens, exact match when it writes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..selection.likelihood import IGNORED
from ..tuner.hosts.bitsandbytes import four_bit_layers_as_they_are
from .data import TokenizedExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerScores:
    """What an evaluation found. Every figure is over all samples at once, whatever the batches were.

    Args:
        samples: examples evaluated.
        tokens: tokens of their answers, end tokens included.
        loss: mean negative log-likelihood of these tokens, in nats.
        accuracy: share of these tokens that were the most likely one, given the true ones before.
        exact_match: share of the answers that greedy decoding writes exactly; None if it was not asked for.
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
    model: nn.Module, examples: TokenizedExamples, batch_size: int = 8, description: str = "Evaluating"
) -> AnswerScores:
    """Loss and accuracy on the answers, with the model in eval mode (it is left so; 4-bit layers as they are).

    Neither depends on the batch size but by the rounding of the model's own arithmetic.
    """
    model.eval()
    loss, correct, tokens = 0.0, 0, 0
    for chosen in _batches(examples, batch_size, description):
        batch = _padded_right([examples[i] for i in chosen], examples.tokenizer).to(_device(model))
        with four_bit_layers_as_they_are(model):
            logits, targets = _answer_logits(model, batch)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
        loss += float(losses.double().sum())
        correct += int(((logits.argmax(-1) == targets) & (targets != IGNORED)).sum())
        tokens += int((targets != IGNORED).sum())
    return AnswerScores(len(examples), tokens, loss / tokens, correct / tokens)


@torch.no_grad()
def written_answers(
    model: Any,
    examples: TokenizedExamples,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    description: str = "Generating",
) -> list[str]:
    """What greedy decoding writes for each example, in their order; the model is left in eval mode.

    Raises:
        ValueError: an example has no prompt to go on from.
    """
    model.eval()
    tokenizer, texts = examples.tokenizer, [""] * len(examples)
    for chosen in _batches(examples, batch_size, description):
        prompts = tokenizer.pad(
            {"input_ids": [_prompt_and_answer(examples[i])[0] for i in chosen]},
            padding_side="left",
            return_tensors="pt",
        ).to(_device(model))
        with four_bit_layers_as_they_are(model):
            written = model.generate(
                input_ids=prompts["input_ids"],
                attention_mask=prompts["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )[:, prompts["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[i] = text
    return texts


def exact_match(
    model: Any, examples: TokenizedExamples, batch_size: int = 8, max_new_tokens: int = 64, **options
) -> float:
    """Share of the examples whose answer greedy decoding writes, compared as text without surrounding spaces.

    Raises:
        ValueError: an example has no prompt to go on from.
    """
    written = written_answers(model, examples, batch_size, max_new_tokens, **options)
    answers = [_prompt_and_answer(examples[i])[1] for i in range(len(examples))]
    texts = examples.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return sum(text.strip() == answer.strip() for text, answer in zip(written, texts, strict=True)) / len(examples)


def _batches(examples: TokenizedExamples, batch_size: int, description: str) -> Iterator[list[int]]:
    """Positions of examples of similar length, the longest first: what does not fit shows at once."""
    lengths = [len(examples[i]["input_ids"]) for i in range(len(examples))]
    order = sorted(range(len(examples)), key=lambda i: -lengths[i])
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc=description, unit="batch", disable=None, leave=False):
        yield order[start : start + batch_size]


def _padded_right(rows: list[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer)(rows)


def _answer_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """float32 ``[b, t, vocabulary]`` and int64 ``[b, t]``, at the positions where any row has a label."""
    targets = batch["labels"][:, 1:]
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        # the logits of a long prompt would take more memory than the rest of the pass
        logits = model(**inputs, logits_to_keep=positions).logits
    else:
        logits = model(**inputs).logits[:, positions]
    return logits.float(), targets[:, positions]


def _prompt_and_answer(row: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    length = sum(label == IGNORED for label in row["labels"])
    if not length:
        raise ValueError("generating needs prompts, and these examples are plain text; leave --generate out")
    return row["input_ids"][:length], row["input_ids"][length:]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
