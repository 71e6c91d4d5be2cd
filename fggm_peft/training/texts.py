"""Text files as references of a selection: their paragraphs, tokenized and batched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ..selection.reference import is_text_file
from ..tuner.files.hub import user_path
from .base_model import this_process
from .data import DataError, Example, TokenizedExamples, padding_on_the_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAGRAPH_LENGTH = 256  # tokens; longer paragraphs are truncated


def read_paragraphs(file: str | Path) -> list[Example]:
    """The paragraphs of a text file, which empty lines separate. The loss is on the whole paragraph."""
    path = user_path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    paragraphs = [Example("", paragraph.strip()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if not paragraphs:
        raise DataError(f"{path} is empty")
    return paragraphs


def text_batches(file: str | Path, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader:
    """A dataloader over the paragraphs of a text file, for ``select_parameters(reference=...)``.

    Each process of a distributed run reads a share. Paragraphs are truncated to 256 tokens.
    """
    process = this_process()
    paragraphs = read_paragraphs(file)[process.process_index :: process.num_processes]
    examples: Any = TokenizedExamples(paragraphs, tokenizer, PARAGRAPH_LENGTH)
    return DataLoader(examples, batch_size=batch_size, collate_fn=padding_on_the_right(tokenizer))


def with_texts(references: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The references of ``select_parameters``, with each text file replaced by its batches."""
    sources = references if isinstance(references, (list, tuple)) else [references]
    if not any(map(is_text_file, sources)):
        return references
    if tokenizer is None:
        raise ValueError("a text file as a reference needs a tokenizer; pass processing_class to the trainer")
    return [text_batches(source, tokenizer) if is_text_file(source) else source for source in sources]
