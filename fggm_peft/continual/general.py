"""General ability: the loss on a text that belongs to no task, compared with the base model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from ..training.data import DataError, TokenizedExamples
from ..training.texts import PARAGRAPH_LENGTH, read_paragraphs
from ..tuner.files import digest_of_folder
from .settings import DataPath, Settings, StreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class General(Settings):
    """A measure of general ability, in addition to the tasks.

    Args:
        text: file of plain text in paragraphs, whose loss is compared with the base model's after every task.
    """

    text: DataPath

    @field_validator("text")
    @classmethod
    def _check_text(cls, value: str) -> str:
        if not Path(value).is_file():
            raise ValueError(f"no file {value}")
        return value

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> TokenizedExamples:
        """The paragraphs of the text.

        Raises:
            StreamError: the text is empty.
        """
        try:
            return TokenizedExamples(read_paragraphs(self.text), tokenizer, PARAGRAPH_LENGTH)
        except DataError as error:
            raise StreamError(f"general.text: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        """Everything that determines the loss: the content of the text."""
        return {"text": digest_of_folder(Path(self.text))}
