"""Text that a language model writes itself: a reference that needs no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..tuner.support import unwrapped
from .likelihood import IGNORED, is_encoder_decoder
from .rounds import callable_base, device_of

_WRITTEN_TOGETHER = 32  # each step reads all weights once, for any number of texts
_BATCH = 8  # batch size of the pass over the texts


def written_batches(model: nn.Module, count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Texts sampled from the model's own distribution, beginning with its start token, as batches with labels.

    The model's generation settings (temperature, top-p) do not apply. Tokens are drawn on the CPU by ``seed``, without
    the global random state. All processes write all texts, because the processes of a sharded model run together.

    Args:
        model: a causal language model whose config has the start and the end token; may be wrapped by PEFT.
        length: largest number of tokens of a text, with the start token; at most the model's positions.

    Raises:
        ValueError: the model is not a decoder, or has no start token.
    """
    start, ends = _special_tokens(unwrapped(model))
    length = min(length, getattr(unwrapped(model).config, "max_position_embeddings", None) or length)
    batches = []
    for first in range(0, count, _WRITTEN_TOGETHER):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + first) % 2**63)
        together = min(_WRITTEN_TOGETHER, count - first)
        written = _written(callable_base(model), start, ends, together, length, generator, device_of(model))
        parts = zip(*(tensor.split(_BATCH) for tensor in written.values()), strict=True)
        batches += [dict(zip(written, part, strict=True)) for part in parts]
    return batches


def _special_tokens(model: nn.Module) -> tuple[int, list[int]]:
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)

    def token(name: str) -> int | list[int] | None:
        own = getattr(generation, name, None)
        return getattr(config, name, None) if own is None else own

    if config is None or is_encoder_decoder(model) or not callable(getattr(model, "generate", None)):
        raise ValueError(
            f"reference='self' requires a causal language model of transformers, not a {type(model).__name__}. "
            "Pass a dataloader of general data as reference= instead."
        )
    end = token("eos_token_id")
    ends = list(end) if isinstance(end, (list, tuple)) else [] if end is None else [end]
    start = token("bos_token_id")
    start = ends[0] if start is None and ends else start
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(start, int) or (vocabulary is not None and not 0 <= start < vocabulary):
        raise ValueError(
            "reference='self': the model's config has no start token (bos_token_id) or end token (eos_token_id) to "
            f"begin with: got {start} for a vocabulary of {vocabulary} tokens. Set bos_token_id, or pass a dataloader "
            "of general text as reference=."
        )
    return start, ends


@torch.no_grad()
def _written(call, start: int, ends: list[int], count: int, length: int, generator, device) -> dict[str, Tensor]:
    """One batch of texts, padded after their end tokens."""
    ids = torch.full((count, 1), start, device=device)
    mask, is_open, past = torch.ones_like(ids), torch.ones_like(ids), None
    for _ in range(length - 1):
        output = call(
            input_ids=ids if past is None else ids[:, -1:], attention_mask=mask, past_key_values=past, use_cache=True
        )
        past = getattr(output, "past_key_values", None)
        probabilities = output.logits[:, -1].float().softmax(-1).cpu()
        drawn = torch.multinomial(probabilities, 1, generator=generator).to(device)
        ids, mask = torch.cat([ids, drawn], 1), torch.cat([mask, is_open], 1)
        is_open = is_open * ~torch.isin(drawn, torch.tensor(ends, device=device, dtype=drawn.dtype))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}
