"""General text as a selection's reference: a file of paragraphs, tokenized and batched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from ..selection.reference import ReferenceData, is_text_file
from ..tuner import FGGMConfig
from .base_model import this_process
from .data import DataError, Example, TokenizedExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARAGRAPH_LENGTH = 256  # tokens of a paragraph; what is longer loses its end


def read_paragraphs(file: str | Path) -> list[Example]:
    """The paragraphs of a text: what stands between empty lines. The loss is on all of each.

    Raises:
        DataError: there is no such file, or nothing in it.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    found = [Example("", part.strip()) for part in text.split("\n\n") if part.strip()]
    if not found:
        raise DataError(f"{path} is empty")
    return found


def text_batches(file: str | Path, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> DataLoader:
    """A dataloader over the paragraphs of a text, as ``select_parameters(reference=...)`` takes it.

    Each process of a distributed run reads a share. A paragraph of more than 256 tokens loses its end.

    Raises:
        DataError: there is no such file, or nothing in it.
    """
    from transformers import DataCollatorForSeq2Seq

    process = this_process()
    share = read_paragraphs(file)[process.process_index :: process.num_processes]
    examples: Any = TokenizedExamples(share, tokenizer, PARAGRAPH_LENGTH)
    return DataLoader(examples, batch_size=batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def has_texts(sources: Any) -> bool:
    """Whether a text file is among references."""
    return any(map(is_text_file, _listed(sources)))


def _listed(sources: Any) -> Sequence[Any]:
    return sources if isinstance(sources, (list, tuple)) else [sources]


def with_texts(sources: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """References with every text file in it replaced by its batches; all else as it is.

    Args:
        sources: as ``select_parameters`` takes them.

    Raises:
        DataError: a text cannot be read.
        ValueError: there is a text, and no tokenizer.
    """
    if not has_texts(sources):
        return sources
    if tokenizer is None:
        raise ValueError("a reference that is a text file needs a tokenizer: give the trainer its processing_class")
    return [text_batches(source, tokenizer) if is_text_file(source) else source for source in _listed(sources)]


def reference_of(given: ReferenceData, config: FGGMConfig, tokenizer: PreTrainedTokenizerBase | None) -> ReferenceData:
    """What a trainer's adapter is weighed against: what the trainer was given, or else what the config says."""
    return with_texts(config.reference if given is None else given, tokenizer)
