"""A task of a sequence: where its rows come from, how they become prompts and answers, and its metric."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jinja2 import StrictUndefined, Template, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BeforeValidator, ValidationInfo, model_validator

from ..training.data import TokenizedExamples, read_examples, row_format
from ..training.rows import FILE_TYPES, DataError, DataSource, as_text, load_rows
from ..tuner.files import digest_of_folder
from .metrics import METRICS
from .settings import Count, DataPath, FolderName, Positive, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]


def _of_training(value: Any) -> Any:
    return {"train": value} if isinstance(value, str) else value


@lru_cache
def template(text: str) -> Template:
    """The template of a text; raises ``ValueError`` if it is none, or contains no column."""
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"{text!r} is the same for every row; a template contains columns, such as {{{{ {text} }}}}")

    def written(value: Any) -> Any:
        # Jinja reports a column that does not exist
        return value if isinstance(value, Undefined) else as_text(value, "a value")

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=written)
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise ValueError(f"not a Jinja template: {error}") from error


# the error for an unknown metric or a wrong template comes hours before the first score is needed
Metric = Annotated[str, AfterValidator(lambda name: METRICS[name] and name)]
TemplateText = Annotated[str, AfterValidator(lambda text: template(text) and text)]


class Task(Settings):
    """One task of a sequence. Its rows come from exactly one of ``path``, ``dataset`` and ``rows``.

    Args:
        name: unique in the stream.
        metric: a name in ``fggm_peft.continual.metrics.METRICS``.
        path: folder with a ``train`` and a ``test`` file (TRACE's format), or a saved data set.
        dataset: Hub id.
        rows: function from the name of a split to its rows; only from Python.
        subset: configuration of a Hub data set.
        split: names of the splits in the data set, such as ``{train: "train[:5000]", test: validation}``; a text is
            the name of the training split.
        prompt, answer: Jinja templates over the columns of a row, for rows of other formats. ``row`` is the whole
            row. They run in Jinja's sandbox. Values in ``{{ }}`` must be text or numbers.
        chat_template: wrap prompts and answers in the tokenizer's chat template.
        max_prompt_length: in tokens; longer prompts are truncated on the left.
        max_answer_length: in tokens, also for generation; longer answers are truncated and counted.
        epochs: passes over this task; overrides that of the stream.
        limit: maximum number of rows of the training split, drawn at random.
        test_limit: maximum number of test rows, the same in every run.
    """

    name: FolderName
    metric: Metric = "exact_match"
    path: DataPath | None = None
    dataset: str | None = None
    rows: Callable[[str], Iterable[Mapping[str, Any]]] | None = None
    subset: str | None = None
    split: Annotated[dict[Split, str], BeforeValidator(_of_training)] = {}
    prompt: TemplateText | None = None
    answer: TemplateText | None = None
    chat_template: bool = False
    max_prompt_length: Count = 1024
    max_answer_length: Count = 512
    epochs: Positive | None = None
    limit: Count | None = None
    test_limit: Count | None = None

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Task:
        if [self.path, self.dataset, self.rows].count(None) != 2:
            raise ValueError("needs exactly one of path (folder) and dataset (Hub id)")
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer are templates that belong together: give both or neither")
        data = (info.context or {}).get("data")
        where = "" if data is None else f". Paths of tasks are relative to data, which is {data}; set it with --data"
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(f"path: no folder {self.path}{where}")
        return self

    def examples(self, split: Split, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> TokenizedExamples:
        """The examples of a split: "train" shuffled by the seed, "test" in the order of its rows.

        The seed also draws the rows for ``limit``. All runs use the same test rows. A warning counts the answers that
        are truncated.

        Raises:
            DataError: rows cannot be read or are empty, or a template fails; the message names file and row.
        """
        source = self._source(split)
        rows = load_rows(source) if self.rows is None else list(self.rows(split))
        is_training = split == "train"
        order = random.Random(seed if is_training else 0).sample(range(len(rows)), len(rows))
        indices = order[: self.limit] if is_training else sorted(order[: self.test_limit])
        format = row_format(list(rows[0]) if rows and self.prompt is None else ["prompt", "answer"], source)
        chosen = ((index, self._rendered(rows[index], index, source)) for index in indices)
        length = self.max_prompt_length + self.max_answer_length
        read = read_examples(chosen, format, source, tokenizer)
        examples = TokenizedExamples(read, tokenizer, length, self.max_prompt_length)
        if too_long := sum(len(answer) > self.max_answer_length for *_, answer in map(examples.parts, read)):
            warnings.warn(
                f"{too_long} of {len(read)} answers of {self.name} ({split}) have more than "
                f"{self.max_answer_length} tokens and are truncated; raise max_answer_length",
                stacklevel=2,
            )
        return examples

    def _rendered(self, row: Mapping[str, Any], index: int, source: DataSource) -> Mapping[str, Any]:
        """The row, or its prompt and answer by the templates."""
        if self.prompt is None:
            return row
        try:
            return {name: template(getattr(self, name)).render({"row": row, **row}) for name in ("prompt", "answer")}
        except Exception as error:  # a template may raise any error, such as a division by zero
            kind = "" if isinstance(error, (TemplateError, ValueError)) else f"{type(error).__name__}: "
            raise DataError(
                f"the templates of task {self.name} fail on row {index + 1} of {source.name}: {kind}{error}; its "
                f"columns are {', '.join(map(str, row))}"
            ) from error

    def _source(self, split: Split) -> DataSource:
        name = self.path or self.dataset or f"the rows of {self.name}"
        return DataSource(name, self.split.get(split, split), self.subset, chat_template=self.chat_template)

    def fingerprint(self) -> dict[str, Any]:
        """Everything in the task that determines results; files by their content, not by their path."""
        return {**self.model_dump(mode="json", exclude={"path", "rows"}), "data": self._data_digest()}

    def _data_digest(self) -> str | None:
        """Digest of the content of files and rows; None for a Hub data set, which its name identifies."""
        if self.rows is not None:
            rows = {split: list(self.rows(split)) for split in ("train", "test")}
            return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
        return None if self.path is None else digest_of_folder(Path(self.path), (*FILE_TYPES, ".arrow"))
