"""Rows of every format are read and tokenized with labels on the answer."""

from __future__ import annotations

import json
import re

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from fggm_peft.training.data import (
    FORMATS,
    IGNORED,
    DataError,
    DataSource,
    Example,
    TokenizedExamples,
    load_examples,
    load_rows,
    padding_on_the_right,
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


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, float("nan"), [], {}, ["a"], {"a": "b"}, True, "\ud83d"], ids=repr)
@pytest.mark.parametrize(
    "row", [row for row, _ in ROWS.values() if "text" not in row and "messages" not in row], ids=str
)
def test_a_value_that_is_not_text_is_an_error_that_names_the_row_and_the_column(row, value, tmp_path):
    for column in row.keys() - {"id"}:
        if (column, value) == ("input", None):
            continue
        with pytest.raises(DataError, match=rf"row 1 of .*{column}"):
            read([{**row, column: value}], tmp_path)


def test_numbers_are_text(tmp_path):
    assert read([{"prompt": 1, "answer": 2.5}], tmp_path) == [Example("1", "2.5")]
    assert read([{"instruction": 7, "input": 0, "output": 1}], tmp_path) == [Example("7\n\n0\n\n", "1")]


# --- conversations -------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.reasoning_content }}{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function.name }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "1+1"}
ANSWER = {"role": "assistant", "content": "two"}


def test_a_completion_of_several_turns_is_learned_as_a_whole(tmp_path):
    row = {"prompt": [USER], "completion": [ANSWER, {"role": "user", "content": "sure?"}, ANSWER]}
    [example] = read([row], tmp_path, byte_tokenizer(CHAT_TEMPLATE))
    assert (example.prompt, example.answer) == (
        "[user]1+1<eos>[assistant]",
        "two<eos>[user]sure?<eos>[assistant]two<eos>",
    )


@pytest.mark.parametrize("empty", [{}, {"content": None}, {"content": "", "reasoning_content": None}])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_tool_calls_and_tools_are_written_by_the_template(tools, empty, tmp_path):
    call = {"role": "assistant", "tool_calls": [CALL], **empty}
    rows = [
        {"messages": [USER, call], "tools": tools},
        {"messages": [USER, call, {"role": "tool", "content": 2}, ANSWER], "tools": tools},
        {"prompt": [USER], "completion": [call, {"role": "tool", "content": "2"}, ANSWER], "tools": tools},
    ]
    for row, answer in zip(
        rows, ("<call>add<eos>", "two<eos>", "<call>add<eos>[tool]2<eos>[assistant]two<eos>"), strict=True
    ):
        [example] = read([row], tmp_path, byte_tokenizer(WITH_TOOLS))
        assert example.prompt.startswith('<tools>[{"type": "function"') and "None" not in example.prompt
        assert example.answer == answer


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": [USER, {**ANSWER, "tool_calls": [CALL]}]}, "tool_calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER, ANSWER]}, "tool_calls"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]}, "reasoning_content"),
        ({"messages": [USER, {**ANSWER, "thinking": "hm"}]}, "thinking"),
        ({"messages": [USER, ANSWER], "tools": [TOOL]}, "tools"),
        ({"prompt": [USER], "completion": [ANSWER], "tools": json.dumps([TOOL])}, "tools"),
    ],
)
def test_what_the_template_does_not_write_is_an_error(row, part, tmp_path):
    with pytest.raises(DataError, match=rf"row 1 of .* has {part}, which the tokenizer's chat template does not write"):
        read([row], tmp_path, byte_tokenizer(CHAT_TEMPLATE))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"content": "two"},
        {"role": None, "content": "two"},
        "two",
    ],
)
def test_a_message_whose_content_is_not_text_is_an_error(message, tmp_path):
    with pytest.raises(DataError, match=r"row 1 of .*: .*column 'messages'"):
        read([{"messages": [USER, message, ANSWER]}], tmp_path, byte_tokenizer(CHAT_TEMPLATE))
    with pytest.raises(DataError, match=r"row 1 of .*: .*column 'completion'"):
        read([{"prompt": "1+1", "completion": [message]}], tmp_path, byte_tokenizer(CHAT_TEMPLATE))


@pytest.mark.parametrize("tools", ["add", {"name": "add"}, "{", 5])
def test_tools_that_are_no_list_are_an_error(tools, tmp_path):
    with pytest.raises(DataError, match=r"row 1 of .*: column 'tools' must be a list"):
        read([{"messages": [USER, ANSWER], "tools": tools}], tmp_path, byte_tokenizer(WITH_TOOLS))


# --- one tokenization ----------------------------------------------------------------------------


def spaced_tokenizer(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of characters that marks the start of a text like a space, as those of Llama 2 and T5."""
    characters = ["▁", *"0123456789+=[]<>abcdefghijklmnopqrstuvwxyz"]
    words = ["<unk>", "<s>", "</s>", *characters, *(f"▁{character}" for character in characters)]
    if kind == "Unigram":
        model = models.Unigram([(word, -9.0 if len(word) == 1 else -5.0) for word in words], 0)
    else:
        merges = [("▁", character) for character in characters]
        model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if kind == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def tokens_of(example: Example, tokenizer) -> tuple[list[str], list[str]]:
    row = TokenizedExamples([example], tokenizer, max_length=200)[0]
    start = sum(label == IGNORED for label in row["labels"])
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    return tokens[:start], tokens[start:]


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace", "Unigram"])
@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("2+2=", "4", (["▁2", "+", "2", "="], ["4"])),
        ("2+2=", " 4", (["▁2", "+", "2", "="], ["▁4"])),
        ("2+2= ", "4", (["▁2", "+", "2", "="], ["▁4"])),
        ("", "4", ([], ["▁4"])),
        ("[a]", "b=a", (["▁[", "a", "]"], ["b", "=", "a"])),
    ],
)
def test_prompt_and_answer_are_tokenized_together(kind, prompt, answer, expected):
    tokenizer = spaced_tokenizer(kind)
    assert tokens_of(Example(prompt, answer), tokenizer) == (expected[0], [*expected[1], "</s>"])
    if prompt:
        assert tokens_of(Example(prompt, answer, is_rendered=True), tokenizer) == expected


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace", "Unigram"])
def test_the_answer_within_a_chat_template_is_tokenized_like_the_whole_text(kind, tmp_path):
    template = CHAT_TEMPLATE.replace("<eos>", "</s>")
    tokenizer = spaced_tokenizer(kind, template)
    [example] = read([{"prompt": "2+2=", "answer": "4"}], tmp_path, tokenizer, chat_template=True)
    prompt, answer = tokens_of(example, tokenizer)
    assert [*prompt, *answer] == tokenizer.tokenize("[user]2+2=</s>[assistant]4</s>") and answer == ["4", "</s>"]


class Slow(PreTrainedTokenizer):
    """A tokenizer without offsets, with the token "=4"."""

    words = ("<eos>", "=4", *"0123456789+=a")

    def get_vocab(self):
        return {word: index for index, word in enumerate(self.words)}

    @property
    def vocab_size(self):
        return len(self.words)

    def _tokenize(self, text, **kwargs):
        return re.findall("=4|.", text)

    def _convert_token_to_id(self, token):
        return self.words.index(token)

    def _convert_id_to_token(self, index):
        return self.words[index]


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [("2+2=", "4", (["2", "+", "2"], ["=4"])), ("2+2", "=5", (["2", "+", "2"], ["=", "5"])), ("", "4", ([], ["4"]))],
)
def test_a_tokenizer_without_offsets_splits_where_the_prompt_alone_ends(prompt, answer, expected):
    tokenizer = Slow(eos_token="<eos>", pad_token="<eos>")
    assert tokens_of(Example(prompt, answer), tokenizer) == (expected[0], [*expected[1], "<eos>"])


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("<bos>ab", "c"), ("ab", "c<eos>"), ("<bos>ab", "c<eos>"), ("", "<bos>abc<eos>"), ("", "<bos>abc"), ("ab", "c")],
)
def test_start_and_end_tokens_in_the_data_are_not_added_again(prompt, answer):
    tokenizer = byte_tokenizer(adds_start=True)
    prompt_tokens, answer_tokens = tokens_of(Example(prompt, answer), tokenizer)
    assert [*prompt_tokens, *answer_tokens] == ["<bos>", "a", "b", "c", "<eos>"]
    no_start = tokens_of(Example(prompt, answer), byte_tokenizer())
    assert [*no_start[0], *no_start[1]].count("<bos>") == (prompt + answer).count("<bos>")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_on_the_right(side):
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    examples = TokenizedExamples([Example("abc", "d"), Example("a", "b")], tokenizer, 20)
    batch = padding_on_the_right(tokenizer)([examples[0], examples[1]])
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]] and tokenizer.padding_side == side
    assert batch["labels"].tolist()[1][3:] == [IGNORED] * 2
