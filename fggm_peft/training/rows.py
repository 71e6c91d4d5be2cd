"""Reads the rows of a task from files, folders, saved datasets and the Hub, without changes to their values."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import IO, Any, Optional

import yaml

from ..tuner.files.hub import may_be_hub_id, user_path
from ..tuner.settings.fields import setting

Records = Sequence[Mapping[str, Any]]
"""The rows of a table, each a dict of column name -> value."""
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")
EVALUATION_SPLITS = ("eval", "validation", "valid", "val", "dev")
_SPACE = re.compile(r"[ \t\r\n]*")


class DataError(ValueError):
    """Data cannot be read, or a row has no answer to learn. The message names the file and the row."""


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


def as_text(value: Any, name: str) -> str:
    """The value as text. ``DataError`` unless it is valid text or a finite number: a model would learn "None".

    Args:
        name: of the value, for the error.
    """
    is_number = isinstance(value, (Real, Decimal)) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and (isinstance(value, int) or math.isfinite(value))):
        kind = "" if is_number or value is None else f" (of the type {type(value).__name__})"
        raise DataError(f"{name} is {'null' if value is None else f'{value!r:.60}'}{kind}, not text or a number")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is not valid text: {error}") from error
    return str(value)


def load_rows(source: DataSource) -> Records:
    """The rows of a source; raises ``DataError`` if they do not exist or cannot be read."""
    path = user_path(source.name)
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


# --- files ---------------------------------------------------------------------------------------


def _read_file(path: Path, suffix: str = "", separator: str = ",") -> Records:
    # `datasets` would infer types: it reads the text "2020-01-31" as a time, and "007" as the number 7
    suffix = suffix or path.suffix
    if suffix not in FILE_TYPES:
        raise DataError(f"cannot read {path}: data files end in {', '.join(FILE_TYPES)}")
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            return parquet.ParquetFile(path).read().to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_csv_rows(file, separator)) if suffix == ".csv" else _json_rows(file.read())
    except Exception as error:  # csv and pyarrow have errors of many types
        raise DataError(f"cannot read {path}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f'{path} must be a list of objects, such as [{{"prompt": ..., "answer": ...}}]')
    return rows


def _csv_rows(file: IO[str], separator: str) -> Iterator[dict[str, str]]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        names = Counter(reader.fieldnames or [])
        if (names.most_common(1) or [("", 0)])[0][1] > 1:
            raise ValueError(f"the header contains {names.most_common(1)[0][0]!r} more than once")
        for row in reader:
            if None in row or None in row.values():
                problem = "more" if None in row else "fewer"
                raise ValueError(
                    f"line {reader.line_num} has {problem} cells than the header; put text that contains "
                    f"{separator!r} between double quotes"
                )
            yield row
    finally:
        csv.field_size_limit(limit)


def _json_rows(text: str) -> list[Any]:
    """The rows of a list, or of JSON Lines. The decoder finds the end of a row, because texts may contain U+2028."""
    rows: list[Any] = []
    decoder, position = json.JSONDecoder(), _SPACE.match(text).end()  # type: ignore[union-attr]
    while position < len(text):
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno} is not JSON: {error}") from error
        rows.append(row)
        position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


# --- datasets ------------------------------------------------------------------------------------


def _load_with_datasets(source: DataSource, path: Path) -> Records:
    import datasets

    # only `datasets` can slice ("train[:10%]"); otherwise all splits are loaded, to find synonyms
    split = source.split if "[" in source.split or "+" in source.split else None
    try:
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            name, is_folder = str(path) if path.is_dir() else source.name, path.is_dir()
            loaded = _read_splits(name, source.subset, split) if is_folder else None
            if loaded is None:
                loaded = datasets.load_dataset(name, source.subset, split=split)
                if not is_folder and _made_by(loaded) == "csv":  # pandas has inferred types
                    loaded = _read_splits(name, source.subset, split)
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"
        reason = " ".join(f"{error}{cause}".split())
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


def _made_by(loaded: Any) -> str | None:
    """The name of the builder of a dataset or of its splits."""
    first = next(iter(loaded.values())) if isinstance(loaded, Mapping) else loaded
    return first.info.builder_name


def _read_splits(name: str, subset: str | None, split: str | None) -> Any:
    """The rows of CSV and JSON files by split, or those of a sliced split; None for other files."""
    import datasets

    builder = datasets.load_dataset_builder(name, subset)
    if builder.name not in ("csv", "json") or getattr(builder.config, "field", None) is not None:
        return None
    manager, separator = datasets.DownloadManager(), getattr(builder.config, "sep", ",")
    loaded: dict[str, list[Any]] = {}
    for name, files in builder.config.data_files.items():
        paths = manager.download_and_extract(list(files))
        loaded[str(name)] = [row for path in paths for row in _read_file(Path(path), f".{builder.name}", separator)]
    if split is None:
        return loaded
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in loaded.items()})
    return [row for part in parts for row in loaded[part.splitname][part.from_ : part.to]]


# --- fields --------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, in which ``1e-4`` is a number, and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.MarkedYAMLError(problem=f"duplicate key {twice[0]!r}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a YAML or JSON file of settings; raises ``ValueError`` in one line, or ``OSError``."""
    text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        json.dumps(fields, ensure_ascii=False, skipkeys=True, default=str).encode()  # text without half surrogate pairs
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"must have fields, got {fields!r:.60}")
    return fields
