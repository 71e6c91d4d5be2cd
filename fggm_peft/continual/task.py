"""A task of a sequence: where its rows are, how they become prompts and answers, and what its answers are judged by."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.data import (
    FILE_TYPES,
    DataError,
    DataSource,
    Example,
    Records,
    RowFormat,
    TokenizedExamples,
    load_rows,
    read_example,
    row_format,
)
from ..tuner.files.atomic import digest_of_files, digest_of_folder
from .settings import StreamError

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "eval", "test")
Split = str | Mapping[str, str]


class _TemplateFailed(DataError):
    """A template that fails on a row; who knows the number of the row adds it."""


class TaskExamples(TokenizedExamples):
    """Examples of a task as a model takes them, and the texts that a metric compares.

    A prompt that is too long loses its left, its start token stays. An answer that is too long loses its end, which is
    counted, and of which building this warns.

    Args:
        sources: the prompts as texts, without a chat template.
        references: the answers as texts, never cut.
        name: of the task and the split, for messages.

    Attributes:
        cut_prompts: how many prompts are longer than ``max_prompt_length`` tokens.
        cut_answers: how many answers, their end token included, are longer than ``max_answer_length``.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int,
        max_answer_length: int,
        sources: Sequence[str],
        references: Sequence[str],
        name: str = "",
    ):
        super().__init__(examples, tokenizer, max_prompt_length + max_answer_length)
        self.max_prompt_length, self.max_answer_length = max_prompt_length, max_answer_length
        self.sources, self.references = sources, references
        self.cut_prompts, self.cut_answers = self._count_cut()
        if self.cut_answers:
            warnings.warn(
                f"{self.cut_answers} of {len(examples)} answers of {name} are longer than {max_answer_length} "
                "tokens, and the model neither learns nor writes their ends; raise max_answer_length",
                stacklevel=3,
            )

    def truncate(self, start: list[int], prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        room = max(0, self.max_prompt_length - len(start))
        prompt = prompt[max(0, len(prompt) - room) :]
        return start[: self.max_prompt_length] + prompt, answer[: self.max_answer_length]

    def _count_cut(self) -> tuple[int, int]:
        starts = [0 if example.is_rendered else len(self.start) for example in self.examples]
        ends = [0 if example.is_rendered or self.tokenizer.eos_token_id is None else 1 for example in self.examples]
        prompts = self._lengths([example.prompt for example in self.examples])
        answers = self._lengths([example.answer for example in self.examples])
        return (
            sum(start + n > self.max_prompt_length for start, n in zip(starts, prompts, strict=True)),
            sum(n + end > self.max_answer_length for end, n in zip(ends, answers, strict=True)),
        )

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


@dataclass(frozen=True)
class Task:
    """One task of a sequence. Its rows come from exactly one of ``path``, ``dataset`` and ``rows``.

    Args:
        name: of its own in the stream.
        metric: a name of ``fggm_peft.continual.metrics.METRICS``, or an id of 🤗 Evaluate.
        path: folder with ``train``, ``eval`` and ``test`` files (TRACE's format) or a data set saved there; one file,
            which is the training data; or files by split, such as ``{train: a.jsonl, test: b.jsonl}``.
        dataset: Hub id.
        rows: function from the name of a split to its rows, from Python only.
        subset: configuration of a Hub data set.
        split: what the splits are called there, such as ``{train: "train[:5000]", test: validation}``; a text alone is
            the training split.
        prompt, answer: Jinja templates over the columns of a row, for rows of another format. ``row`` is the whole row.
            They run in Jinja's sandbox, and what they write is text, whatever is in it.
        chat_template: wrap prompts and answers in the tokenizer's chat template.
        max_prompt_length: in tokens; longer prompts lose their left.
        max_answer_length: in tokens, also when the model writes; answers that are longer are counted.
        epochs: passes over this task, if not those of the stream.
        limit: this many rows of the training split at most, drawn at random.
        test_limit: this many of the other splits, the same in every run.

    Raises:
        StreamError: fields do not fit together or are out of range.
    """

    name: str
    metric: str = "exact_match"
    path: Split | None = None
    dataset: str | None = None
    rows: Callable[[str], Iterable[Mapping[str, Any]]] | None = None
    subset: str | None = None
    split: Split | None = None
    prompt: str | None = None
    answer: str | None = None
    chat_template: bool = False
    max_prompt_length: int = 1024
    max_answer_length: int = 512
    epochs: float | None = None
    limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise StreamError(f"name is {self.name!r}; it names folders, so it must not be empty, hidden or have a /")
        if sum(where is not None for where in (self.path, self.dataset, self.rows)) != 1:
            raise StreamError("give one of path (file or folder) and dataset (Hub id), so that there is data")
        if (self.prompt is None) != (self.answer is None):
            raise StreamError("prompt and answer are templates that go together: give both or neither")
        for field in ("prompt", "answer"):
            _compiled(getattr(self, field), field)
        for field, least in (("max_prompt_length", 1), ("max_answer_length", 1), ("limit", 1), ("test_limit", 1)):
            if getattr(self, field) is not None and getattr(self, field) < least:
                raise StreamError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.epochs is not None and self.epochs <= 0:
            raise StreamError(f"epochs must be above 0, got {self.epochs}")
        for field in ("path", "split"):
            self._check_splits(field)

    def _check_splits(self, field: str) -> None:
        given = getattr(self, field)
        if isinstance(given, Mapping) and (unknown := [name for name in given if name not in SPLITS]):
            raise StreamError(f"{field} has a split {unknown[0]!r}; the splits of a task are {', '.join(SPLITS)}")

    def check_files(self) -> None:
        """Raises StreamError if a file or folder of ``path`` is missing, before hours of training find out."""
        if self.path is None:
            return
        paths = self.path.values() if isinstance(self.path, Mapping) else [self.path]
        for path in map(Path, paths):
            if not path.exists():
                raise StreamError(f"path: no file or folder {path}")
        if isinstance(self.path, str) and _split_file(Path(self.path), self._split_name("train")):
            test = self._split_name("test")
            if not _split_file(Path(self.path), test):
                raise StreamError(f"path: {self.path} has training data, but no {test}.json ({', '.join(FILE_TYPES)})")

    def examples(self, split: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> TaskExamples:
        """The examples of a split: "train" shuffled by the seed, another in the order of its rows.

        The seed also draws the rows under ``limit``. It does not touch the other splits: every run is tested on the
        same rows.

        Raises:
            DataError: rows cannot be read or say nothing to learn, or a template fails; names file and row.
        """
        source = self._source(split)
        rows = self._load_rows(split, source)
        format = self._format(list(rows[0]), source)
        found = [self._read(rows, i, format, source, tokenizer) for i in self._chosen(split, len(rows), seed)]
        kept = [triple for triple in found if triple is not None]
        if not kept:
            raise DataError(f"every row of {source.name} is empty")
        examples, sources, references = zip(*kept, strict=True)
        lengths = (self.max_prompt_length, self.max_answer_length)
        return TaskExamples(examples, tokenizer, *lengths, sources, references, f"{self.name} ({split})")

    def _chosen(self, split: str, count: int, seed: int) -> list[int]:
        is_training = split == "train"
        order = random.Random(seed if is_training else 0).sample(range(count), count)
        return order[: self.limit] if is_training else sorted(order[: self.test_limit])

    def _read(
        self, rows: Records, index: int, format: RowFormat, source: DataSource, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Example, str, str] | None:
        """The example of a row, its prompt and its answer as texts; None for an empty row of plain text."""
        row = rows[index]
        try:
            example = read_example(row, index, format, source, tokenizer)
            if example is None:
                return None
            prompt, answer = format.read(row)
        except _TemplateFailed as error:
            raise DataError(
                f"the templates of task {self.name} fail on row {index + 1} of {source.name}: {error}; its columns are "
                f"{', '.join(map(str, row))}"
            ) from error
        return example, _last_text(prompt), _last_text(answer)

    def _format(self, columns: list[str], source: DataSource) -> RowFormat:
        prompt, answer = _compiled(self.prompt, "prompt"), _compiled(self.answer, "answer")
        if prompt is None or answer is None:
            return row_format(columns, source)
        return RowFormat(("prompt", "answer"), lambda row: (_rendered(prompt, row), _rendered(answer, row)))

    def _split_name(self, split: str) -> str:
        if isinstance(self.split, Mapping):
            return self.split.get(split, split)
        return self.split if self.split is not None and split == "train" else split

    def _source(self, split: str) -> DataSource:
        name = self.path if self.path is not None else self.dataset or f"the rows of {self.name}"
        if isinstance(name, Mapping):
            if split not in name:
                raise DataError(f"path of task {self.name} has no {split!r}, only {', '.join(name)}")
            name = name[split]
        elif self.path is not None and split != "train" and Path(name).is_file():
            raise DataError(
                f"path of task {self.name} is one file, which is its training data; for others give "
                f"path: {{train: {Path(name).name}, {split}: ...}}"
            )
        return DataSource(name, split=self._split_name(split), subset=self.subset, use_chat_template=self.chat_template)

    def _load_rows(self, split: str, source: DataSource) -> Records:
        if self.rows is None:
            return load_rows(source)
        rows = list(self.rows(split))
        if not rows:
            raise DataError(f"{source.name} are none for the split {split!r}")
        return rows

    def fingerprint(self) -> dict[str, Any]:
        """Whatever of the task decides results, in plain types; files by their content, not by where they are."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("path", "rows")}
        split = dict(self.split) if isinstance(self.split, Mapping) else self.split
        return {**plain, "split": split, "data": self._data_digest()}

    def _data_digest(self) -> str | None:
        """Of the content of files and rows; None for a Hub data set, which is known by its name."""
        if self.rows is not None:
            rows = {split: list(self.rows(split)) for split in ("train", "test")}
            return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
        if isinstance(self.path, Mapping):
            return digest_of_files({split: Path(path) for split, path in self.path.items()})
        return None if self.path is None else digest_of_folder(Path(self.path), (*FILE_TYPES, ".arrow"))


def _last_text(text: Any) -> str:
    """The text, or the last message of a conversation."""
    if isinstance(text, list):
        return str(text[-1]["content"]) if text else ""
    return "" if text is None else str(text)


def _compiled(text: str | None, field: str) -> Template | None:
    if text is None:
        return None
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "{{" not in text and "{%" not in text:
        raise StreamError(
            f"{field} is {text!r}, the same for every row; a template has columns, such as {{{{ {text} }}}}"
        )
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
    )
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise StreamError(f"{field} is not a Jinja template: {error}") from error


def _not_null(value: Any) -> Any:
    if value is None:  # Jinja would write the word None, and a model would learn it
        raise ValueError("a value is null; write {{ column or '' }} where that is meant")
    return value


def _rendered(template: Template, row: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return template.render({"row": row, **row})
    except Exception as error:  # a template may divide by zero as well as miss a column
        kind = "" if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__}: "
        raise _TemplateFailed(f"{kind}{error}") from error


def _split_file(folder: Path, split: str) -> Path | None:
    return next((path for suffix in FILE_TYPES if (path := folder / f"{split}{suffix}").is_file()), None)
