"""Rows are read as they were written, or an error names the file and the row."""

from __future__ import annotations

import csv
import json
import math
from datetime import date
from decimal import Decimal

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fggm_peft.training.data import load_examples
from fggm_peft.training.rows import DataError, DataSource, as_text, load_rows

ROWS = [{"prompt": "a,b", "answer": "007"}, {"prompt": 'say "hi"\n', "answer": "N/A"}, {"prompt": "é", "answer": "1e5"}]


@pytest.mark.parametrize("value", ["", "text", "a\u2028b", 0, -7, 10**30, 1.5, Decimal("7.10"), np.int64(3)], ids=str)
def test_text_and_numbers_are_text(value):
    assert as_text(value, "it") == str(value)


NOT_TEXT = [None, math.nan, math.inf, Decimal("NaN"), True, [], {}, ["a"], {"a": 1}, b"a", date(2020, 1, 31), print]


@pytest.mark.parametrize("value", NOT_TEXT, ids=repr)
def test_a_value_of_another_type_is_an_error(value):
    with pytest.raises(DataError, match=r"^it is (null|.*), not text or a number$"):
        as_text(value, "it")


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00", "\udfff\ud83d"])
def test_half_a_surrogate_pair_is_an_error(text):
    with pytest.raises(DataError, match="it is not valid text"):
        as_text(text, "it")


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_only_json_ends_a_row(suffix, character, tmp_path):
    rows = [{"text": f"a{character}b"}, {"text": "c"}]
    file = tmp_path / f"rows{suffix}"
    lines = [json.dumps(row, ensure_ascii=ord(character) < 32) for row in rows]
    for separator in ("\n", "\r\n", "\n\n", "\n \n"):
        file.write_text(separator.join(lines) + separator, encoding="utf-8", newline="")
        assert load_rows(DataSource(str(file))) == rows
    file.write_text(json.dumps(rows, ensure_ascii=ord(character) < 32), encoding="utf-8-sig")
    assert load_rows(DataSource(str(file))) == rows


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_indented_objects_are_rows(suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_text("\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert load_rows(DataSource(str(file))) == ROWS


def test_an_object_that_contains_the_rows_is_reported_by_its_fields(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=2))
    with pytest.raises(DataError, match=r"the columns of .*rows\.json are version, data; expected"):
        load_examples(DataSource(str(tmp_path / "rows.json")), None)


# --- CSV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer\na,b\nc,d,e\n", "line 3 has more cells than the header"),
        ("x,y\na,b,c\n", "line 2 has more cells"),
        ("prompt,answer\na,b\nc\n", "line 3 has fewer cells"),
        ("prompt,answer,answer\na,b,c\n", "the header contains 'answer' more than once"),
        ('prompt,answer\na,"b\nc,d\n', "unexpected end of data"),
        ('prompt,answer\na,"b"c\n', "expected after"),
    ],
)
def test_csv_that_would_lose_text_is_an_error(text, message, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=rf"cannot read .*rows\.csv: .*{message}"):
        load_rows(DataSource(str(tmp_path / "rows.csv")))


def test_a_cell_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text(f"prompt,answer\n{'a' * 200_000},b\n")
    assert len(load_rows(DataSource(str(tmp_path / "rows.csv")))[0]["prompt"]) == 200_000
    assert csv.field_size_limit() == limit


def write(file, rows) -> None:
    if file.suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(file)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("name", ["words.csv", "words.json", "words.jsonl", "words.parquet", "data/train-00000.csv"])
def test_a_file_in_a_folder_is_read_like_the_file_itself(name, tmp_path):
    rows = [*ROWS, {"prompt": "NA", "answer": "N/A"}, {"prompt": "day", "answer": "2020-01-31"}]
    file = tmp_path / "folder" / name
    file.parent.mkdir(parents=True)
    write(file, rows)
    assert list(load_rows(DataSource(str(file)))) == rows
    assert list(load_rows(DataSource(str(tmp_path / "folder")))) == rows
    assert list(load_rows(DataSource(str(tmp_path / "folder"), split="train[1:3]"))) == rows[1:3]
    with pytest.raises(DataError, match="no split 'test'"):
        load_rows(DataSource(str(tmp_path / "folder"), split="test"))


def test_a_file_in_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "words.csv").write_text("prompt,answer\na,b,c\n")
    with pytest.raises(DataError, match=r"cannot read .*words\.csv: line 2 has more cells"):
        load_rows(DataSource(str(tmp_path)))


# --- mutations -----------------------------------------------------------------------------------

MANY = settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=3)), min_size=1, max_size=3))
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_mutated_file_is_read_as_text_or_is_an_error(suffix, changes, tmp_path):
    file = tmp_path / f"rows{suffix}"
    write(file, ROWS)
    content = bytearray(file.read_bytes())
    for position, replacement in changes:
        position %= len(content)
        content[position : position + len(replacement) or position + 1] = replacement
    file.write_bytes(content)
    try:
        examples = load_examples(DataSource(str(file)), None)
    except DataError as error:
        assert file.name in str(error)
    else:
        for example in examples:
            assert example.answer.strip()
            (example.prompt + example.answer).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@MANY
@given(values=st.lists(JSON, min_size=2, max_size=2))
@pytest.mark.parametrize(
    "columns", [("prompt", "answer"), ("instruction", "output"), ("messages", "tools")], ids="+".join
)
def test_rows_with_any_value_are_text_or_an_error_that_names_the_row(columns, values, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([dict(zip(columns, values, strict=True))]))
    try:
        [example] = load_examples(DataSource(str(tmp_path / "rows.json")), None)
    except DataError as error:
        assert "row 1 of" in str(error)
    else:
        kinds = [type(value) for value in values]
        assert all(kind in (str, int, float) for kind in kinds) and example.answer == str(values[1])
