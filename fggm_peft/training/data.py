"""Reads the examples of a task and turns them into token ids with labels on the answer."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ..selection.likelihood import IGNORED
from .rows import DataError, DataSource, as_text, load_rows

if TYPE_CHECKING:
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

Turns = list[dict[str, Any]]
"""Messages of a conversation, each with a role and a content."""
PARTS = ("tool_calls", "reasoning_content", "thinking")
"""What a message may contain beside its content."""


@dataclass(frozen=True)
class Example:
    """A prompt and its answer. The loss is on the answer only.

    Args:
        prompt: may be empty; the loss is then on the whole text.
        answer: the text after the prompt. No space is added between them.
        is_rendered: a chat template wrote both texts, so they contain the start and end tokens.
        texts: prompt and answer without the template, for metrics; of a conversation its last messages.
    """

    prompt: str
    answer: str
    is_rendered: bool = False
    texts: tuple[str, str] = field(default=("", ""), compare=False)


# --- columns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """How to read rows that have certain columns.

    ``read`` returns prompt and answer, each as text or as messages. The prompt is None for plain text, and an answer
    is None if the row has none.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str | Turns | None, str | Turns | None]]


def _pair(prompt: str, answer: str) -> RowFormat:
    return RowFormat((prompt, answer), lambda row: (_content(row, prompt), _answer(row, answer)))


def _plain(column: str) -> RowFormat:
    return RowFormat((column,), lambda row: (None, _answer(row, column)))


def _content(row: Mapping[str, Any], column: str) -> str | Turns:
    value = row[column]
    return _messages(value, column) if isinstance(value, list) and value else as_text(value, f"column {column!r}")


def _answer(row: Mapping[str, Any], column: str) -> str | Turns | None:
    return None if row[column] is None else _content(row, column)


def _messages(value: Any, column: str) -> Turns:
    """The messages of a column, each with a content that is text. Keys without a value are omitted."""
    is_list = isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)
    if not is_list or not all(isinstance(turn.get("role"), str) for turn in value):
        raise DataError(f"column {column!r} must be text or a list of messages with role and content")
    turns = [{key: part for key, part in turn.items() if part is not None and part != []} for turn in value]
    for turn in turns:
        content = turn.get("content", "" if "tool_calls" in turn else None)
        turn["content"] = as_text(content, f"the content of a message in column {column!r}")
    return turns


def _read_instruction(row: Mapping[str, Any]) -> tuple[str, str | Turns | None]:
    columns = ["instruction", *(["input"] if row.get("input") not in (None, "") else [])]
    texts = [as_text(row[column], f"column {column!r}") for column in columns]
    return "\n\n".join([*texts, ""]), _answer(row, "output")


def _read_messages(row: Mapping[str, Any]) -> tuple[Turns, Turns]:
    messages = _messages(row["messages"], "messages")
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages[:-1], messages[-1:]


FORMATS = (
    RowFormat(("messages",), _read_messages),
    _pair("prompt", "answer"),
    _pair("prompt", "completion"),
    _pair("question", "answer"),
    RowFormat(("instruction", "output"), _read_instruction),
    _plain("text"),
)
"""The first format whose columns all exist is used."""


def row_format(columns: Sequence[str], source: DataSource) -> RowFormat:
    """The format of rows with these columns; raises ``DataError`` if none fits."""
    prompt, answer = source.prompt_column, source.answer_column
    formats: Sequence[RowFormat] = FORMATS
    if prompt is not None:
        usual = (name for name in ("answer", "completion", "output") if name in columns)
        formats = [_pair(prompt, answer or next(usual, "answer"))]
    elif answer is not None:
        formats = [_plain(answer)]
    for candidate in formats:
        if set(candidate.columns) <= set(columns):
            return candidate
    expected = ", or ".join(" + ".join(candidate.columns) for candidate in formats)
    raise DataError(
        f"the columns of {source.name} are {', '.join(columns)}; expected {expected}. Name the columns with "
        "--prompt-column and --answer-column"
    )


# --- examples ------------------------------------------------------------------------------------


def load_examples(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, seed: int = 0
) -> list[Example]:
    """The examples of a source, shuffled by ``seed``: files are often sorted by class, and ``limit`` may cut them.

    Raises:
        DataError: the data cannot be read, no row format fits, or a row has no answer.
    """
    rows = load_rows(source)
    format = row_format(list(rows[0]), source)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return read_examples(((index, rows[index]) for index in order[:limit]), format, source, tokenizer)


def read_examples(
    rows: Iterable[tuple[int, Mapping[str, Any]]], format: RowFormat, source: DataSource, tokenizer: Any
) -> list[Example]:
    """The examples of rows with their index (from 0, for errors), without empty rows of plain text."""
    read = (_read(row, f"row {index + 1} of {source.name}", format, source, tokenizer) for index, row in rows)
    examples = [example for example in read if example is not None]
    if not examples:
        raise DataError(f"every row of {source.name} is empty, or there are none")
    return examples


def _read(row: Any, name: str, format: RowFormat, source: DataSource, tokenizer: Any) -> Example | None:
    try:
        prompt, answer = format.read(row)
        tools = _tools(row)
    except KeyError as error:
        raise DataError(f"{name} has no {error}; it must have {' + '.join(format.columns)}") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    turns = [] if answer is None else _turns(answer, "assistant")
    if not any(turn["content"].strip() or "tool_calls" in turn for turn in turns):
        if prompt is None:
            return None  # empty rows separate the paragraphs of plain text
        raise DataError(f"{name} has an empty answer ({format.columns[-1]}); remove the row")
    texts = _last_text(prompt), _last_text(answer)
    if isinstance(answer, str) and not isinstance(prompt, list) and not (source.chat_template and prompt is not None):
        return Example(prompt or "", answer, texts=texts)
    start, end = _rendered(_turns(prompt or [], "user"), turns, tools, name, tokenizer)
    return Example(start, end, is_rendered=True, texts=(texts[0], texts[1] or end))


def _last_text(text: str | Turns | None) -> str:
    return text[-1]["content"] if isinstance(text, list) and text else str(text or "")


def _turns(content: str | Turns, role: str) -> Turns:
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The column "tools", which may be JSON in a text."""
    tools = row.get("tools")
    with suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools and not isinstance(tools, list):
        raise DataError("column 'tools' must be a list of tools, or JSON of one")
    return tools or None


def _rendered(prompt: Turns, answer: Turns, tools: list[Any] | None, name: str, tokenizer: Any) -> tuple[str, str]:
    """Both in the tokenizer's chat template. The answer starts where the model would start to generate."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} is a conversation, but the tokenizer of {tokenizer.name_or_path} has no chat template. Use the "
            "instruct version of the model, or rows with prompt and answer"
        )

    def render(turns: Turns, tools: list[Any] | None = tools, **options: Any) -> str:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)

    turns = [*prompt, *answer]
    try:
        start = render(prompt, add_generation_prompt=True) if prompt else ""
        text = render(turns)
    except Exception as error:  # a template can raise anything
        raise DataError(f"the chat template rejects {name}: {error}") from error

    def is_ignored(part: str) -> bool:
        others = [{key: value for key, value in turn.items() if key != part} for turn in turns]
        try:
            is_used = (part == "tools" and tools) or others != turns
            return bool(is_used) and render(others, None if part == "tools" else tools) == text
        except Exception:  # the template requires this part
            return False

    if ignored := next(filter(is_ignored, ("tools", *PARTS)), None):
        raise DataError(f"{name} has {ignored}, which the tokenizer's chat template does not write; remove it")
    if not text.startswith(start):
        raise DataError(
            f"the chat template does not write {name} as prompt, then answer; use prompt and answer columns"
        )
    return start, text[len(start) :]


# --- tokens --------------------------------------------------------------------------------------


class TokenizedExamples(Dataset):
    """Examples as model inputs: ``input_ids``, ``attention_mask`` and ``labels``, tokenized on access.

    The end token is part of the answer. An example longer than ``max_length`` loses the left part of its prompt, but
    keeps its start token. An answer that still does not fit is truncated. Every row keeps at least one token with a
    loss and one token before it.

    Args:
        max_prompt_length: prompts are truncated to this length, also if the answer is short, and answers to the rest.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        max_prompt_length: int | None = None,
    ):
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 (one token each of prompt and answer), got {max_length}")
        self.examples, self.tokenizer = examples, tokenizer
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        ids, start = tokenizer("a")["input_ids"], tokenizer.bos_token_id
        self.start = [start] if start is not None and ids[:1] == [start] else []  # if the tokenizer adds one

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        prompt, answer = self.truncate(*self.parts(example))
        if len(prompt) + len(answer) < 2 or not answer:
            raise DataError(f"an example of one token has nothing to predict: {example!r}")
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORED] * len(prompt) + answer,
        }

    @property
    def sources(self) -> list[str]:
        """The prompts as texts, without a chat template and never truncated."""
        return [example.texts[0] for example in self.examples]

    @property
    def references(self) -> list[str]:
        """The answers as texts."""
        return [example.texts[1] for example in self.examples]

    def parts(self, example: Example) -> tuple[list[int], list[int], list[int]]:
        """The start tokens to add, the prompt, and the answer with its end token, before truncation.

        Prompt and answer are tokenized together, because many tokenizers write the start of a text in another way. A
        token with characters of both belongs to the answer.
        """
        text, is_fast = example.prompt + example.answer, self.tokenizer.is_fast
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=is_fast)
        ids = encoded["input_ids"]
        if is_fast:
            is_answer = [end > len(example.prompt) for _, end in encoded["offset_mapping"]]
        else:  # the tokens after those that the prompt has alone
            alone = self.tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
            is_answer = [token != other for token, other in zip_longest(ids, alone[: len(ids)])]
        length = is_answer.index(True) if True in is_answer else len(ids)
        prompt, answer, end = ids[:length], ids[length:], self.tokenizer.eos_token_id
        if example.is_rendered:
            return [], prompt, answer
        has_end = end is None or answer[-1:] == [end]
        return [] if ids[:1] == self.start else self.start, prompt, answer if has_end else [*answer, end]

    def truncate(self, start: list[int], prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Prompt (with the start tokens) and answer, at most ``max_length`` tokens together."""
        limit = self.max_prompt_length
        needed = int(bool(start or prompt)) if limit is None else limit  # a prompt keeps the token before the answer
        answer = answer[: self.max_length - needed]
        prompt_length = self.max_length - len(answer) if limit is None else limit
        dropped = max(0, len(start) + len(prompt) - prompt_length)
        return start[:prompt_length] + prompt[dropped:], answer


def padding_on_the_right(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """A collator for ``TokenizedExamples``.

    Padding on the left would shift the absolute positions of a sample by an amount that depends on its batch.
    """
    from transformers import DataCollatorForSeq2Seq

    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer)
