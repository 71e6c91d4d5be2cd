"""Reads the examples of a task and turns them into token ids with labels on the answer."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from torch.utils.data import Dataset

from ..selection.likelihood import IGNORED
from ..tuner.files.hub import may_be_hub_id
from ..tuner.settings.fields import setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Records = Sequence[Mapping[str, Any]]
"""The rows of a table, each a dict of column name -> value."""
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
EVALUATION_SPLITS = ("eval", "validation", "valid", "val", "dev")


class DataError(ValueError):
    """Data cannot be read, or a row has no answer to learn. The message names the file and the row."""


@dataclass(frozen=True)
class Example:
    """A prompt and its answer. The loss is on the answer only.

    Args:
        prompt: may be empty; the loss is then on the whole text.
        answer: the text after the prompt. No space is added between them.
        is_rendered: a chat template wrote both texts, so they contain the start and end tokens.
    """

    prompt: str
    answer: str
    is_rendered: bool = False


@dataclass(frozen=True)
class DataSource:
    """Where rows come from, and which of their columns to use."""

    name: str = field(metadata={"help": "A .json, .jsonl, .csv or .parquet file, a folder, or a Hub id."})
    split: str = setting("train", "Split of a folder or a Hub dataset. eval and validation are synonyms.")
    subset: Optional[str] = setting(None, "Configuration of a Hub dataset.")
    prompt_column: Optional[str] = setting(None, "Column of the prompts; None recognizes it by its name.")
    answer_column: Optional[str] = setting(
        None, "Column of the answers; None recognizes it by its name. Without a prompt column it is plain text."
    )
    chat_template: bool = setting(False, "Wrap prompts and answers in the tokenizer's chat template.")

    @property
    def split_names(self) -> list[str]:
        """The split and its synonyms."""
        return [self.split, *(EVALUATION_SPLITS if self.split in EVALUATION_SPLITS else ())]


# --- rows ----------------------------------------------------------------------------------------


def load_rows(source: DataSource) -> Records:
    """The rows of a source; raises ``DataError`` if they do not exist or cannot be read."""
    path = Path(source.name).expanduser()
    files = [path / f"{split}{suffix}" for split in source.split_names for suffix in FILE_TYPES]
    file = path if path.is_file() else next((file for file in files if file.is_file()), None)
    if file is not None:
        rows = _read_file(file)
    elif path.is_dir() or (may_be_hub_id(source.name) and path.suffix not in FILE_TYPES):
        rows = _load_with_datasets(source, path)
    else:
        raise DataError(f"no file or folder {source.name!r}")
    if not len(rows):
        raise DataError(f"{source.name} has no rows")
    return rows


def _read_file(path: Path) -> Records:
    # `datasets` would infer types: it reads the text "2020-01-31" as a time, and "007" as the number 7
    if path.suffix not in FILE_TYPES:
        raise DataError(f"cannot read {path}: data files end in {', '.join(FILE_TYPES)}")
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.ParquetFile(path).read().to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else _parse_json(file.read(), path.suffix)
    except (OSError, ValueError) as error:  # JSON, Unicode and Arrow errors are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} must be a list of objects, such as [{{"prompt": ..., "answer": ...}}]')
    return rows


def _parse_json(text: str, suffix: str) -> list[Any]:
    if suffix == ".json" and text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
    return rows


def _load_with_datasets(source: DataSource, path: Path) -> Records:
    import datasets

    # only `datasets` can slice ("train[:10%]"); otherwise all splits are loaded, to find synonyms
    split = source.split if "[" in source.split or "+" in source.split else None
    try:
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(source.name, source.subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot load the dataset {source.name!r} (split {source.split!r}): {reason}. Give a file "
            f"({', '.join(FILE_TYPES)}), a folder with {source.split}.json, or a Hub id"
        ) from error
    if not isinstance(loaded, Mapping):
        return loaded
    for name in source.split_names:
        if name in loaded:
            return loaded[name]
    raise DataError(f"{source.name} has no split {source.split!r}; it has {', '.join(loaded)}. Choose one with --split")


# --- columns -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """How to read rows that have certain columns.

    ``read`` returns prompt and answer. The prompt is a text, a list of messages, or None for plain text.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str | list[dict[str, str]] | None, Any]]


def _pair(prompt: str, answer: str) -> RowFormat:
    return RowFormat((prompt, answer), lambda row: (row[prompt], row[answer]))


def _plain(column: str) -> RowFormat:
    return RowFormat((column,), lambda row: (None, row[column]))


def _read_instruction(row: Mapping[str, Any]) -> tuple[str, Any]:
    parts = [row["instruction"], *([row["input"]] if row.get("input") else []), ""]
    return "\n\n".join(parts), row["output"]


def _read_messages(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], Any]:
    messages = list(row["messages"])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages[:-1], messages[-1]["content"] if messages else None


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
    read = (read_example(rows[index], index, format, source, tokenizer) for index in order[:limit])
    examples = [example for example in read if example is not None]
    if not examples:
        raise DataError(f"every row of {source.name} is empty")
    return examples


def read_example(row, index: int, format: RowFormat, source: DataSource, tokenizer) -> Example | None:
    """The example of a row (``index`` counts from 0, for errors); None for an empty row of plain text."""
    name, columns = f"row {index + 1} of {source.name}", " + ".join(format.columns)
    try:
        prompt, answer = format.read(row)
        if isinstance(answer, list) and answer:  # TRL's conversational completions
            answer = answer[-1]["content"]
    except KeyError as error:
        raise DataError(f"{name} has no {error}; it must have {columns}") from error
    except TypeError as error:
        raise DataError(f"{name}: {columns} has an unexpected form: {error}") from error
    if isinstance(answer, (Mapping, list)) and answer:
        raise DataError(f"{name}: the answer ({format.columns[-1]}) is a {type(answer).__name__}, not a text")
    if answer is None or not str(answer).strip():
        if prompt is None:
            return None  # empty rows separate the paragraphs of plain text
        raise DataError(f"{name} has an empty answer ({format.columns[-1]}); remove the row")
    if isinstance(prompt, list) or (source.chat_template and prompt is not None):
        return _rendered(prompt, str(answer), name, tokenizer)
    return Example("" if prompt is None else str(prompt), str(answer))


def _rendered(prompt: str | list[dict[str, str]], answer: str, name: str, tokenizer) -> Example:
    """The example in the tokenizer's chat template. The answer starts where the model would start to generate."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} is a conversation, but the tokenizer of {tokenizer.name_or_path} has no chat template. Use the "
            "instruct version of the model, or rows with prompt and answer"
        )
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    conversation = [*messages, {"role": "assistant", "content": answer}]
    try:
        start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) if messages else ""
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # a template can raise anything
        raise DataError(f"the chat template rejects {name}: {error}") from error
    if not text.startswith(start):
        raise DataError(
            f"the chat template does not write {name} as prompt, then answer; use prompt and answer columns"
        )
    return Example(start, text[len(start) :], is_rendered=True)


# --- tokens --------------------------------------------------------------------------------------


class TokenizedExamples(Dataset):
    """Examples as model inputs: ``input_ids``, ``attention_mask`` and ``labels``, tokenized on access.

    The end token is part of the answer. An example longer than ``max_length`` loses the left part of its prompt, but
    keeps its start token. An answer that still does not fit is truncated. Every row keeps at least one token with a
    loss and one token before it.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 (one token each of prompt and answer), got {max_length}")
        self.examples, self.tokenizer, self.max_length = examples, tokenizer, max_length
        ids, start = tokenizer("a")["input_ids"], tokenizer.bos_token_id
        self.start = [start] if start is not None and ids[:1] == [start] else []  # if the tokenizer adds one

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        prompt, answer = self._ids(example.prompt), self._ids(example.answer)
        start = [] if example.is_rendered else self.start
        if not example.is_rendered and self.tokenizer.eos_token_id is not None:
            answer = [*answer, self.tokenizer.eos_token_id]
        prompt, answer = self.truncate(start, prompt, answer)
        if len(prompt) + len(answer) < 2 or not answer:
            raise DataError(f"an example of one token has nothing to predict: {example!r}")
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORED] * len(prompt) + answer,
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def truncate(self, start: list[int], prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Prompt (with the start tokens) and answer, at most ``max_length`` tokens together. Subclasses override it."""
        needed = 1 if start or prompt else 0  # the answer's first token is predicted from one before it
        answer = answer[: self.max_length - needed]
        prompt_length = self.max_length - len(answer)
        dropped = max(0, len(start) + len(prompt) - prompt_length)
        return start[:prompt_length] + prompt[dropped:], answer
