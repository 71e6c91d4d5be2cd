"""A stream file from anywhere is a stream, or one StreamError that names the file."""

from __future__ import annotations

import copy
import json

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import byte_tokenizer

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.settings import StreamError
from fggm_peft.continual.stream import Stream

MANY = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "a").mkdir()
    for split in ("train", "test"):
        (folder / "a" / f"{split}.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}]))
    (folder / "text.txt").write_text("One.\n\nTwo.")
    return folder


def fields() -> dict:
    return {
        "model": "model",
        "data": ".",
        "tasks": [
            {"name": "one", "path": "a", "metric": "accuracy", "epochs": 2},
            {"name": "two", "path": "a", "prompt": "{{ prompt }}", "answer": "{{ answer }}", "split": "train"},
        ],
        "task_defaults": {"max_answer_length": 8, "limit": 3},
        "methods": ["sft", {"name": "fggm", "label": "rows", "density": 0.1}, {"name": "lora", "r": 2}],
        "training": {"max_steps": 2, "bf16": "auto", "schedule": "cosine", "learning_rate": 1e-4},
        "learning_rates": [1e-4, 1e-3],
        "seeds": [0, 1],
        "orders": ["given", "random:3", ["two", "one"]],
        "general": {"text": "text.txt"},
        "gate": {"keep": {"one": 0.9}, "action": "stop"},
    }


def check(text: str, folder, suffix: str = ".yaml") -> None:
    file = folder / f"stream{suffix}"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        stream = read_stream(file)
    except StreamError as error:
        assert str(file) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(stream, Stream)
        json.dumps(stream.fingerprint())


def test_the_file_is_valid(folder):
    file = folder / "valid.yaml"
    file.write_text(yaml.safe_dump(fields()))
    assert len(read_stream(file).task_orders()) == 3


TEXT = yaml.safe_dump(fields())


@MANY
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(TEXT)), st.text("ab1 :-{}[]&*!|>'\"#%@\n\t,?~\\\x00\u2028", max_size=4)),
        min_size=1,
        max_size=4,
    )
)
@example(changes=[(0, "- ")])
@example(changes=[(0, "&a [*a]\n")])
def test_mutated_text_is_a_stream_or_an_error(changes, folder):
    text = TEXT
    for position, replacement in changes:
        text = text[:position] + replacement + text[position + (len(replacement) or 3) :]
    check(text, folder)


ODD = [None, True, -1, 0, 1e400, float("nan"), 2**70, "", "x", "~", "../x", "a\x00b", "\ud83d", "{{", "é" * 300]
KEYS = st.sampled_from(["name", "path", "text", "0"])
VALUES = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield from places(entry, (*path, key))


@MANY
@given(place=st.sampled_from([place for place in places(fields()) if place]), value=VALUES)
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_field_with_another_value_is_a_stream_or_an_error(suffix, place, value, folder):
    changed = copy.deepcopy(fields())
    *parents, last = place
    target = changed
    for key in parents:
        target = target[key]
    target[last] = value
    check(json.dumps(changed) if suffix == ".json" else yaml.safe_dump(changed), folder, suffix)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("task_defaults",), True),
        (("methods", 2, "settings"), []),
        (("methods", 2, "settings"), {"name": None}),
        (("gate", "keep"), ["one=0.9"]),
        (("gate", "keep"), [{"one": 0.9}]),
        (("tasks", 0, "path"), {"train": "a"}),
        (("model",), "é" * 300),
        (("tasks", 1, "prompt"), "\ud83d {{ prompt }}"),
        (("tasks", 0), {"name": "one", None: 1}),
    ],
)
def test_a_field_of_a_wrong_type_is_an_error(place, value, folder):
    changed = fields()
    *parents, last = place
    target = changed
    for key in parents:
        target = target[key]
    target[last] = value
    (folder / "stream.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(StreamError, match=r"stream\.yaml"):
        read_stream(folder / "stream.yaml")


@pytest.mark.parametrize("line", ["tasks: []", "training: {max_steps: 1, max_steps: 2}", "seeds: [0]"])
def test_a_key_that_occurs_twice_is_named(folder, line):
    file = folder / "twice.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in fields().items() if k != "training"}) + line)
    with pytest.raises(StreamError, match=rf"twice.yaml: .*duplicate key '{'max_steps' if '{' in line else line[:5]}'"):
        read_stream(file)
