"""Examples of a task: read from a file, a folder or the Hub, and turned into token ids with labels on the answer."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ..selection.likelihood import IGNORED
from ..tuner.files.hub import may_be_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, Any]]
Messages = list[dict[str, str]]


class DataError(ValueError):
    """Data that cannot be read, or a row that says nothing to learn; names the file and the row."""


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that should follow it; the loss is taken on the answer only.

    Args:
        prompt: may be empty: then the loss is on everything.
        answer: what follows the prompt, as it stands: no space is added between them.
        is_rendered: a chat template wrote both, so that start and end tokens are in the text.
    """

    prompt: str
    answer: str
    is_rendered: bool = False


@dataclass(frozen=True)
class DataSource:
    """Where rows come from and which of their columns matter.

    Args:
        name: a .json, .jsonl, .csv or .parquet file, a folder, or a Hub id.
        split: of a folder or a Hub data set; "eval" and "validation" stand for each other.
        subset: configuration of a Hub data set.
        prompt_column: holds the prompts, if its name is not one of the known ones.
        answer_column: holds the answers; without a prompt column, the loss is on all of it.
        use_chat_template: wrap prompts and answers in the tokenizer's chat template.
    """

    name: str
    split: str = "train"
    subset: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    use_chat_template: bool = False


# --- rows: where they are ------------------------------------------------------------------------


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_json_lines(path)
    return json.loads(text)


def _read_json_lines(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
    return rows


def _read_csv(path: Path) -> Rows:
    # not through pandas or datasets, which would turn the answer "007" into the number 7
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> Rows:
    from pyarrow import parquet

    return parquet.ParquetFile(path).read().to_pylist()


FILE_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
SAME_SPLITS = ("eval", "validation", "valid", "val", "dev")


def load_rows(source: DataSource) -> Rows:
    """The rows of a source, as a sequence of dicts.

    Raises:
        DataError: there is no such file, folder, split or Hub data set, or it cannot be read.
    """
    path = Path(source.name).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, source)
    elif _looks_like_a_path(source.name):
        raise DataError(f"no file or folder {source.name!r}")
    else:
        rows = _load_with_datasets(source)
    if not len(rows):
        raise DataError(f"{source.name} has no rows")
    return rows


def _looks_like_a_path(name: str) -> bool:
    return not may_be_hub_id(name) or Path(name).suffix in FILE_READERS


def _read_file(path: Path) -> Rows:
    reader = FILE_READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"cannot read {path}: data files end in {', '.join(FILE_READERS)}")
    try:
        rows = reader(path)
    except DataError:
        raise
    except (OSError, ValueError) as error:  # JSON, Unicode and Arrow errors are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} must be a list of objects, such as [{{"prompt": ..., "answer": ...}}]')
    return rows


def _read_folder(folder: Path, source: DataSource) -> Rows:
    splits = [source.split, *SAME_SPLITS] if source.split in SAME_SPLITS else [source.split]
    for split in splits:
        for suffix in FILE_READERS:
            if (folder / f"{split}{suffix}").is_file():
                return _read_file(folder / f"{split}{suffix}")
    return _load_with_datasets(source)


def _load_with_datasets(source: DataSource) -> Rows:
    import datasets

    try:
        path = Path(source.name).expanduser()
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(source.name, source.subset, split=_sliced(source))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot load the data set {source.name!r} (split {source.split!r}): {reason}. Give a file "
            f"({', '.join(FILE_READERS)}), a folder with {source.split}.json, or a Hub id"
        ) from error
    return _pick_split(loaded, source) if isinstance(loaded, Mapping) else loaded


def _sliced(source: DataSource) -> str | None:
    """The split if ``datasets`` must cut it ("train[:10%]"); else None, to choose among the names there are."""
    return source.split if "[" in source.split or "+" in source.split else None


def _pick_split(loaded: Mapping[str, Any], source: DataSource) -> Rows:
    names = [source.split, *SAME_SPLITS] if source.split in SAME_SPLITS else [source.split]
    for name in names:
        if name in loaded:
            return loaded[name]
    raise DataError(f"{source.name} has no split {source.split!r}; it has {', '.join(loaded)}. Choose one with --split")


# --- formats: which column is what ---------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """How rows with certain columns are read.

    Args:
        columns: a row of this format has all of them.
        read: row -> prompt (a text, or the messages of a conversation; None for none) and answer.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str | Messages | None, Any]]


def _pair(prompt: str, answer: str) -> RowFormat:
    return RowFormat((prompt, answer), lambda row: (row[prompt], row[answer]))


def _plain(column: str) -> RowFormat:
    return RowFormat((column,), lambda row: (None, row[column]))


def _read_instruction(row: Mapping[str, Any]) -> tuple[str, Any]:
    task, given = row["instruction"], row.get("input")
    return (f"{task}\n\n{given}" if given else task) + "\n\n", row["output"]


def _read_messages(row: Mapping[str, Any]) -> tuple[Messages, Any]:
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
"""Tried in this order; the first whose columns are all there is taken."""


def row_format(columns: Sequence[str], source: DataSource) -> RowFormat:
    """The format of rows with these columns.

    Raises:
        DataError: none fits, or a column that was asked for is missing; lists the columns there are.
    """
    chosen = _chosen_columns(columns, source)
    for candidate in [chosen] if chosen else FORMATS:
        if set(candidate.columns) <= set(columns):
            return candidate
    wanted = " + ".join(chosen.columns) if chosen else ", ".join(" + ".join(format.columns) for format in FORMATS)
    raise DataError(
        f"the columns of {source.name} are {', '.join(columns)}; wanted: {wanted}. Name the right ones with "
        "--prompt-column and --answer-column"
    )


def _chosen_columns(columns: Sequence[str], source: DataSource) -> RowFormat | None:
    prompt, answer = source.prompt_column, source.answer_column
    if prompt is None and answer is None:
        return None
    if answer is None:
        answer = next((name for name in ("answer", "completion", "output") if name in columns), "answer")
    return _plain(answer) if prompt is None else _pair(prompt, answer)


# --- examples: what prompt and answer are --------------------------------------------------------


def load_examples(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, seed: int = 0
) -> list[Example]:
    """The examples of a source, shuffled: files are often sorted by class, and not always read to their end.

    Args:
        tokenizer: its chat template renders conversations.
        limit: this many at most.
        seed: of the order.

    Raises:
        DataError: as ``load_rows`` and ``row_format``; or a row has no answer.
    """
    rows = load_rows(source)
    format = row_format(list(rows[0]), source)
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    examples = [read_example(rows[i], i, format, source, tokenizer) for i in order[:limit]]
    kept = [example for example in examples if example is not None]
    if not kept:
        raise DataError(f"every row of {source.name} is empty")
    return kept


def read_example(row, index: int, format: RowFormat, source: DataSource, tokenizer) -> Example | None:
    where = f"row {index + 1} of {source.name}"
    try:
        prompt, answer = format.read(row)
        if isinstance(answer, list) and answer:  # a completion that is a conversation, as TRL has it
            answer = answer[-1]["content"]
    except KeyError as error:
        raise DataError(f"{where} has no {error}; it must have {' + '.join(format.columns)}") from error
    except TypeError as error:
        raise DataError(f"{where}: {' + '.join(format.columns)} is not of the form expected: {error}") from error
    if isinstance(answer, (Mapping, list)) and answer:
        raise DataError(f"{where} has a {type(answer).__name__} as its answer ({format.columns[-1]}), not a text")
    if answer is None or not str(answer).strip():
        if prompt is None:
            return None  # corpora of plain text separate their paragraphs by empty rows
        raise DataError(f"{where} has an empty answer ({format.columns[-1]}): nothing to learn. Remove the row")
    if isinstance(prompt, list) or (source.use_chat_template and prompt is not None):
        return _rendered(prompt, str(answer), where, tokenizer)
    return Example("" if prompt is None else str(prompt), str(answer))


def _rendered(prompt: str | Messages, answer: str, where: str, tokenizer) -> Example:
    """The example in the tokenizer's chat template; the answer starts where the model would go on."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, and the tokenizer of {tokenizer.name_or_path} has no chat template. Use the "
            "instruct version of the model, or data with prompt and answer"
        )
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    whole = [*before, {"role": "assistant", "content": answer}]
    try:
        start = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True) if before else ""
        text = tokenizer.apply_chat_template(whole, tokenize=False)
    except Exception as error:  # templates raise whatever their authors thought of
        raise DataError(f"the chat template rejects {where}: {error}") from error
    if not text.startswith(start):
        raise DataError(
            f"the chat template does not put the answer of {where} behind its prompt; use prompt and answer"
        )
    return Example(start, text[len(start) :], is_rendered=True)


# --- tokens --------------------------------------------------------------------------------------


class TokenizedExamples(Dataset):
    """Examples as a model takes them: ``input_ids``, ``attention_mask`` and ``labels``, tokenized when asked for.

    The end token belongs to the answer. What is longer than ``max_length`` loses the left of its prompt
    (its start token stays); an answer that does not fit even so loses its end. Every row keeps at least
    one token with a loss, and one before it that predicts it.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int):
        if max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a token of the prompt, one of the answer), got {max_length}"
            )
        self.examples, self.tokenizer, self.max_length = examples, tokenizer, max_length
        self.start = _start_tokens(tokenizer)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        example = self.examples[index]
        prompt, answer = self._ids(example.prompt), self._ids(example.answer)
        start = [] if example.is_rendered else self.start
        if not example.is_rendered and self.tokenizer.eos_token_id is not None:
            answer = [*answer, self.tokenizer.eos_token_id]
        prompt, answer = self._truncated(start, prompt, answer)
        if len(prompt) + len(answer) < 2 or not answer:
            raise DataError(f"nothing can be predicted in an example of one token: {example!r}")
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORED] * len(prompt) + answer,
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _truncated(self, start: list[int], prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        least = 1 if start or prompt else 0  # the answer's first token needs one that predicts it
        answer = answer[: self.max_length - least]
        room = self.max_length - len(answer)
        kept = max(0, room - len(start))
        return start[:room] + prompt[len(prompt) - min(kept, len(prompt)) :], answer


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, if the tokenizer puts one in front of a text by itself."""
    start = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return [start] if start is not None and ids[:1] == [start] else []
