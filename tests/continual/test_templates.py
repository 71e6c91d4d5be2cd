"""Templates write text and numbers; another value is an error."""

from __future__ import annotations

import pytest

from fggm_peft.continual.task import Task, template
from fggm_peft.training.data import DataError

ROW = {
    "text": "t",
    "number": 5,
    "null": None,
    "list": ["a", None],
    "dict": {"a": 1, "b": None},
    "items": "own",
    "nan": float("nan"),
    "flag": True,
    "half": "\ud83d",
}


def render(text: str) -> str:
    return template(text).render({"row": ROW, **ROW})


@pytest.mark.parametrize(
    "name", ["null", "list", "dict", "nan", "flag", "half", "dict.b", "row", "row.keys", "list[1]"]
)
@pytest.mark.parametrize("form", ["{{ # }}", "text {{ # }}", "{% set x = # %}{{ x }}"])
def test_a_value_that_is_not_text_is_an_error(form, name):
    with pytest.raises(DataError, match="a value is"):
        render(form.replace("#", name))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ text ~ number ~ (null or '-') }}", "t5-"),
        ("{{ items }}{{ row['items'] }}", "ownown"),
        ("{{ dict.a }} {{ dict | tojson }}", '1 {"a": 1, "b": null}'),
        ("{% for key, value in row.dict.items() %}{{ key }}{% endfor %}", "ab"),
        ("{{ null | default('none', true) }}{% if null is none %}!{% endif %}", "none!"),
        ("{{ [text, number] | join('+') }} {{ '%s %d' % (text, number) }} {{ '%s' % text }}", "t+5 t 5 t"),
        ("{{ '{} {x}'.format(text, x=number) }} {{ number % 2 }} {{ text | upper }}", "t 5 1 T"),
        ("{{ 'yes' if flag else 'no' }} {{ list | length }} {{ list | first }}", "yes 2 a"),
    ],
)
def test_text_and_numbers_are_written(text, expected):
    assert render(text) == expected


def test_the_error_names_the_row_and_the_columns():
    task = Task(name="t", rows=lambda split: [ROW], prompt="Q: {{ null }}", answer="{{ text }}")
    with pytest.raises(DataError, match=r"row 1 of the rows of t: a value is null.*its columns are text, number"):
        task.examples("train", None)
