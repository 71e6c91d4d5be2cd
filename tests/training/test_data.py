"""Rows of every format are read and tokenized with labels on the answer."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fggm_peft.training.data import (
    FORMATS,
    IGNORED,
    DataError,
    DataSource,
    Example,
    TokenizedExamples,
    load_examples,
    load_rows,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, adds_start: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that texts and tokens are easy to compare."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<bos>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=chat_template,
    )


def read(rows: list[dict], folder, tokenizer=None, **source) -> list[Example]:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return load_examples(DataSource(str(path), **source), tokenizer or byte_tokenizer())


def split_by_loss(row: dict, tokenizer) -> tuple[str, str]:
    """The text without a loss and the text with a loss after it."""
    labels = row["labels"]
    start = sum(label == IGNORED for label in labels)
    assert labels[:start] == [IGNORED] * start and labels[start:] == row["input_ids"][start:]
    assert row["attention_mask"] == [1] * len(labels)
    return tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(row["input_ids"][start:])


ROWS = {
    ("messages",): (
        {
            "messages": [
                {"role": "user", "content": "1?"},
                {"role": "assistant", "content": "one"},
                {"role": "user", "content": "2?"},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "thanks"},
            ]
        },
        ("[user]1?<eos>[assistant]one<eos>[user]2?<eos>[assistant]", "two<eos>"),
    ),
    ("prompt", "answer"): ({"prompt": "1 + 1 =", "answer": " 2"}, ("1 + 1 =", " 2<eos>")),
    ("prompt", "completion"): ({"prompt": "Say", "completion": " hi"}, ("Say", " hi<eos>")),
    ("question", "answer"): ({"question": "Why?", "answer": "So.", "id": 3}, ("Why?", "So.<eos>")),
    ("instruction", "output"): (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        ("Add.\n\n1 1\n\n", "2<eos>"),
    ),
    ("text",): ({"text": "All of it"}, ("", "All of it<eos>")),
}


@pytest.mark.parametrize("columns", [format.columns for format in FORMATS], ids="+".join)
def test_the_loss_of_each_format_is_on_the_answer(columns, tmp_path):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    row, expected = ROWS[columns]
    examples = TokenizedExamples(read([row], tmp_path, tokenizer), tokenizer, max_length=200)
    assert split_by_loss(examples[0], tokenizer) == expected


def test_an_instruction_may_have_no_input(tmp_path):
    assert read([{"instruction": "Sing.", "input": "", "output": "la"}], tmp_path) == [Example("Sing.\n\n", "la")]


def test_conversational_prompts_and_completions_are_rendered_as_messages(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Say"}],
        "completion": [{"role": "assistant", "content": "hi"}],
    }
    [example] = read([row], tmp_path, byte_tokenizer(CHAT_TEMPLATE))
    assert example == Example("[user]Say<eos>[assistant]", "hi<eos>", is_rendered=True)


def test_the_chat_template_wraps_prompt_and_answer_on_request(tmp_path):
    rows = [{"prompt": "Say", "answer": "hi"}]
    [example] = read(rows, tmp_path, byte_tokenizer(CHAT_TEMPLATE), chat_template=True)
    assert example == Example("[user]Say<eos>[assistant]", "hi<eos>", is_rendered=True)


def test_columns_can_be_named(tmp_path):
    rows = [{"a": "x", "b": "y", "prompt": "no", "answer": "no"}]
    assert read(rows, tmp_path, prompt_column="a", answer_column="b") == [Example("x", "y")]
    assert read(rows, tmp_path, prompt_column="a") == [Example("x", "no")]
    assert read(rows, tmp_path, answer_column="b") == [Example("", "y")]


def test_truncation_keeps_the_start_token():
    tokenizer = byte_tokenizer(adds_start=True)
    rows = TokenizedExamples([Example("abcdef", "xy")], tokenizer, max_length=6)
    assert split_by_loss(rows[0], tokenizer) == ("<bos>ef", "xy<eos>")


@given(prompt=st.text("ab", max_size=12), answer=st.text("xy", min_size=1, max_size=12), length=st.integers(2, 30))
@pytest.mark.parametrize("adds_start", [False, True])
def test_truncation_removes_the_left_of_the_prompt_and_keeps_an_answer_token(adds_start, prompt, answer, length):
    tokenizer = TOKENIZERS[adds_start]
    row = TokenizedExamples([Example(prompt, answer)], tokenizer, length)[0]
    before, after = split_by_loss(row, tokenizer)
    before = before.removeprefix("<bos>") if adds_start else before
    assert len(row["input_ids"]) <= length
    assert any(label != IGNORED for label in row["labels"][1:])
    assert prompt.endswith(before) and f"{answer}<eos>".startswith(after)
    least = bool(prompt) or adds_start
    full = len(prompt) + len(answer) + 1 + adds_start
    assert len(row["input_ids"]) == min(length, full)
    if len(answer) + 1 + least <= length:
        assert after == f"{answer}<eos>"


TOKENIZERS = {adds_start: byte_tokenizer(adds_start=adds_start) for adds_start in (False, True)}
PAIRS = [{"prompt": f"{n}:", "answer": f"00{n}"} for n in range(4)] + [{"prompt": "4:", "answer": "2020-01-31"}]


def _write(path, rows) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        path.write_text("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows))
    else:
        Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_of_every_type_are_read_without_changes(suffix, tmp_path):
    _write(tmp_path / f"rows{suffix}", PAIRS)
    assert list(load_rows(DataSource(str(tmp_path / f"rows{suffix}")))) == PAIRS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_folder_has_a_file_for_each_split(suffix, tmp_path):
    _write(tmp_path / f"train{suffix}", PAIRS)
    _write(tmp_path / f"validation{suffix}", PAIRS[:2])
    assert len(load_rows(DataSource(str(tmp_path)))) == 5
    assert len(load_rows(DataSource(str(tmp_path), split="eval"))) == 2


def test_a_saved_data_set_is_read_by_split(tmp_path):
    splits = {"train": Dataset.from_list(PAIRS), "validation": Dataset.from_list(PAIRS[:2])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(load_rows(DataSource(str(tmp_path / "saved")))) == 5
    assert len(load_rows(DataSource(str(tmp_path / "saved"), split="eval"))) == 2
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        load_rows(DataSource(str(tmp_path / "saved"), split="test"))


def test_a_hub_data_set_is_loaded_by_name_subset_and_split(monkeypatch):
    calls = []

    def load_dataset(name, subset, split):
        calls.append((name, subset, split))
        data = Dataset.from_list(PAIRS)
        return data if split else DatasetDict(train=data)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load_rows(DataSource("someone/pairs", subset="small"))) == 5
    assert len(load_rows(DataSource("someone/pairs", split="train[:2]"))) == 5
    assert calls == [("someone/pairs", "small", None), ("someone/pairs", None, "train[:2]")]


def test_the_order_is_shuffled_by_the_seed_before_the_limit(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    source = DataSource(str(tmp_path / "rows.json"))
    whole = load_examples(source, byte_tokenizer(), seed=1)
    assert sorted(example.prompt for example in whole) == [f"{n}:" for n in range(5)]
    assert load_examples(source, byte_tokenizer(), limit=2, seed=1) == whole[:2]
    assert any(load_examples(source, byte_tokenizer(), seed=seed) != whole for seed in range(2, 6))


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_an_empty_answer_is_an_error_that_names_the_row_and_the_file(answer, tmp_path):
    with pytest.raises(DataError, match=r"row 2 of .*rows\.json has an empty answer"):
        read([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": answer}], tmp_path)


def test_empty_rows_of_plain_text_are_skipped(tmp_path):
    assert read([{"text": "a"}, {"text": " \n"}], tmp_path) == [Example("", "a")]
    with pytest.raises(DataError, match="every row"):
        read([{"text": ""}], tmp_path)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"x": "1", "y": "2"}], r"the columns of .* are x, y; expected messages, or prompt \+ answer"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a"}], "row 2 of .* has no 'answer'"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "row 1 .* empty answer"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "no chat template"),
        ([], "has no rows"),
        (["text"], "must be a list of objects"),
    ],
)
def test_wrong_rows_are_errors_that_name_the_expected_columns(rows, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read(rows, tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", "[{", r"cannot read .*rows\.json"),
        ("rows.jsonl", '{"text": "a"}\n{', "line 2 is not JSON"),
        ("rows.parquet", "no", r"cannot read .*rows\.parquet"),
        ("rows.txt", "no", r"data files end in \.json, \.jsonl, \.csv, \.parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(DataSource(str(tmp_path / name)))


def test_a_missing_file_is_not_requested_from_the_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match="no file or folder"):
        load_rows(DataSource("missing.json"))
