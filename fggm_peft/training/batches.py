"""Converts a trainer's batch to what selection reads: model inputs with ``labels``, one sample per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..selection.likelihood import IGNORED

# what TRL's preference trainers add to the model's inputs; KTO adds copies of the inputs with answers to other prompts
_NOT_INPUTS = ("completion_mask", "label", "ref_", "KL_")
MAX_NEW_TOKENS = 256  # of a generated answer, if the generation settings have no limit


def selection_batch(batch: Any, trainer: Any = None) -> Mapping[str, Any]:
    """A trainer's batch as model inputs with labels, one sample per row. Batches of prompts need ``trainer``."""
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Mapping) and "prompt" in batch[0]:
        if trainer is None:
            raise ValueError("the trainer's batches are prompts without answers; use FGGMTrainerMixin to generate them")
        return with_answers(trainer, [example["prompt"] for example in batch])
    if not isinstance(batch, Mapping):
        return batch  # select_parameters raises the error
    if "labels" not in batch and "completion_mask" in batch:
        inputs = {key: value for key, value in batch.items() if not key.startswith(_NOT_INPUTS)}
        inputs["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        return inputs if "label" in batch else _paired(inputs)
    return _unpacked(batch)


def with_answers(trainer: Any, prompts: list[Any]) -> dict[str, Tensor]:
    """Prompts (texts, or lists of messages) with one sampled answer each, for trainers such as TRL's GRPO.

    The answers are sampled from the model, with the trainer's generation settings, so the scores are the true Fisher
    information at the task's prompts. Only the answers have labels.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    is_text = isinstance(prompts[0], str)
    if not is_text:
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        settings |= {"chat_template": getattr(trainer, "chat_template", None)}
        settings |= getattr(trainer, "chat_template_kwargs", None) or {}
        prompts = [tokenizer.apply_chat_template(prompt, **settings) for prompt in prompts]
    # a chat template has already written the special tokens
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=is_text, return_tensors="pt")
    ids, mask = (encoded[key].to(next(model.parameters()).device) for key in ("input_ids", "attention_mask"))
    config = getattr(trainer, "generation_config", None) or model.generation_config
    with _eval_mode(model):
        sequences = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            max_new_tokens=config.max_new_tokens or MAX_NEW_TOKENS,
            do_sample=True,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = sequences[:, ids.shape[1] :]
    end_tokens = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    is_end = torch.isin(answers, torch.tensor(end_tokens, device=answers.device)).long()
    is_answer = (is_end.cumsum(1) - is_end) == 0  # up to and including the first end token
    labels = torch.cat([torch.full_like(ids, IGNORED), answers.masked_fill(~is_answer, IGNORED)], 1)
    return {"input_ids": sequences, "attention_mask": torch.cat([mask, is_answer.long()], 1), "labels": labels}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for all modules; a selection leaves those with gradient checkpointing in training mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _paired(batch: dict[str, Any]) -> dict[str, Any]:
    """DPO's batch (all chosen answers, then all rejected ones) as pairs, so that a sample limit keeps both kinds."""
    size = len(batch["input_ids"])
    if size % 2:
        return batch
    order = torch.arange(size).view(2, -1).T.flatten()
    is_row = {key: isinstance(value, Tensor) and value.shape[:1] == (size,) for key, value in batch.items()}
    return {key: value[order.to(value.device)] if is_row[key] else value for key, value in batch.items()}


def _unpacked(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Packed sequences in separate rows. A position of 0 starts a sequence, but single padding tokens have it too."""
    positions, labels, ids = (batch.get(key) for key in ("position_ids", "labels", "input_ids"))
    if not all(isinstance(value, Tensor) and value.dim() == 2 for value in (positions, labels, ids)):
        return batch
    assert isinstance(positions, Tensor) and isinstance(labels, Tensor) and isinstance(ids, Tensor)
    mask = batch.get("attention_mask")
    is_token = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(ids, dtype=torch.bool)
    starts = (positions == 0) & is_token
    if bool((starts.sum(1) <= 1).all()):
        return batch
    numbers = torch.where(is_token, starts.flatten().cumsum(0).view_as(starts), 0)
    sequences = [numbers == number for number in range(1, int(numbers.max()) + 1)]
    sequences = [tokens for tokens in sequences if tokens.sum() > 1 or (labels[tokens] != IGNORED).any()]
    columns = {
        "input_ids": (0, [ids[tokens] for tokens in sequences]),
        "attention_mask": (0, [torch.ones_like(ids[tokens]) for tokens in sequences]),
        "labels": (IGNORED, [labels[tokens] for tokens in sequences]),
    }
    return {key: pad_sequence(rows, True, padding) for key, (padding, rows) in columns.items()}
