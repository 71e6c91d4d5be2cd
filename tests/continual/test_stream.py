"""Reading a stream file: tasks, orders, fingerprint, and one-line errors."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from models import byte_tokenizer

from fggm_peft.continual.metrics import METRICS
from fggm_peft.continual.reading import read_stream, ready_streams
from fggm_peft.continual.run import runs_of
from fggm_peft.continual.settings import StreamError
from fggm_peft.continual.stream import MethodSettings, Stream, Training, differences
from fggm_peft.continual.task import Task
from fggm_peft.training.base_model import BaseModel
from fggm_peft.training.data import IGNORED, DataError

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = """
model: HuggingFaceTB/SmolLM2-135M-Instruct
methods: [fggm, sft, {name: fggm, label: fggm-5%, density: 5e-2}]
task_defaults: {max_answer_length: 64}
tasks:
  - {name: intent, path: data/intent}
  - {name: code, path: data/code, metric: rouge_l, epochs: 3,
     prompt: "{{ x }}\\n", answer: "{{ y }}"}
  - {name: sums, dataset: someone/sums, split: "train[:90%]", metric: accuracy, max_answer_length: 8}
training: {epochs: 1, batch_size: 8, learning_rate: 3.0e-4, schedule: linear, warmup_ratio: 0.1}
learning_rates: [1e-4, 3E-4]
seeds: [0, 1, 2]
orders: [given, reversed, "random:3", [code, sums, intent]]
general: {text: data/general.txt}
"""
INTENTS = [{"prompt": f"Utterance {n}:", "answer": f" intent {n % 3}"} for n in range(20)]


def changes(stream, other) -> list[str]:
    """Differences from another stream or from a saved fingerprint."""
    saved = other.fingerprint() if isinstance(other, Stream) else other
    return differences(stream.fingerprint(), saved)


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder) -> None:
    write_rows(folder / "data/intent/train.json", INTENTS)
    write_rows(folder / "data/intent/test.json", INTENTS[:6])
    write_rows(folder / "data/code/train.jsonl", [{"x": f"f{n}", "y": f"g{n}"} for n in range(4)])
    write_rows(folder / "data/code/test.jsonl", [{"x": "t", "y": "u"}])
    (folder / "data/general.txt").write_text("Some plain text.")


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path)
    (tmp_path / "stream.yaml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def settings(folder, monkeypatch) -> dict:
    """The fields of the file as a mapping; its paths are relative to the working directory."""
    monkeypatch.chdir(folder)
    return yaml.safe_load(TEXT.replace("5e-2", "0.05"))


def split_by_loss(row, tokenizer) -> tuple[str, str]:
    """The text without loss, and the text with loss."""
    length = sum(label == IGNORED for label in row["labels"])
    assert row["labels"][length:] == row["input_ids"][length:]
    parts = (row["input_ids"][:length], row["input_ids"][length:])
    texts = ("".join(tokenizer.convert_ids_to_tokens(part)) for part in parts)
    return tuple(text.replace("Ġ", " ").replace("Ċ", "\n") for text in texts)


# --- reading -------------------------------------------------------------------------------------


def test_a_file_is_read_field_by_field(folder):
    stream = read_stream(folder / "stream.yaml")
    assert stream.model == BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert [task.name for task in stream.tasks] == ["intent", "code", "sums"]
    assert stream.methods == (
        MethodSettings(name="fggm"),
        MethodSettings(name="sft"),
        MethodSettings(name="fggm", label="fggm-5%", density=0.05),
    )
    assert stream.training == Training(epochs=1, batch_size=8, learning_rate=3e-4, schedule="linear", warmup_ratio=0.1)
    assert stream.rates(stream.methods[0]) == (1e-4, 3e-4)
    assert stream.seeds == (0, 1, 2)
    assert stream.general.text == str(folder / "data/general.txt")


def test_defaults_apply_to_tasks_without_their_own_settings(folder):
    tasks = read_stream(folder / "stream.yaml").tasks
    assert [task.max_answer_length for task in tasks] == [64, 64, 8]


def test_a_task_may_set_its_own_epochs(folder):
    stream = read_stream(folder / "stream.yaml")
    assert [stream.training_of(task).epochs for task in stream.tasks] == [1, 3, 1]
    assert {stream.training_of(task).batch_size for task in stream.tasks} == {8}


def test_json_and_yaml_and_a_mapping_are_the_same_stream(folder, settings):
    (folder / "stream.json").write_text(json.dumps(yaml.safe_load(TEXT.replace("5e-2", "0.05"))))
    assert read_stream(folder / "stream.yaml") == read_stream(folder / "stream.json") == read_stream(settings)


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-04", "'1e-4'", ".1e-3"])
def test_numbers_are_read_in_every_notation(written, folder):
    text = TEXT.replace("learning_rate: 3.0e-4", f"learning_rate: {written}")
    (folder / "stream.yaml").write_text(text)
    assert read_stream(folder / "stream.yaml").training.learning_rate == 1e-4


def test_a_text_that_starts_like_a_number_stays_a_text(folder):
    (folder / "stream.yaml").write_text(TEXT.replace("name: fggm, label: fggm-5%", "name: fggm, label: 1e5th"))
    assert read_stream(folder / "stream.yaml").methods[2].label == "1e5th"


def test_paths_are_relative_to_the_file_and_data_paths_to_the_data_folder(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert read_stream(folder / "stream.yaml").tasks[0].path == str(folder / "data/intent")
    moved = TEXT.replace("path: data/intent", "path: intent").replace("data/code", "code")
    (folder / "stream.yaml").write_text(moved.replace("text: data/", "text: ") + "data: data\n")
    stream = read_stream(folder / "stream.yaml")
    assert stream.tasks[0].path == str(folder / "data/intent")
    assert stream.general is not None and stream.general.text == str(folder / "data/general.txt")


def test_arguments_override_the_file_and_are_relative_to_the_working_directory(folder, monkeypatch):
    make_data(folder / "other")
    (folder / "other" / "model").mkdir()
    monkeypatch.chdir(folder / "other")
    stream = read_stream(folder / "stream.yaml", data=".", model="model", seeds=[7], general=None)
    assert stream.tasks[0].path == str(folder / "other/data/intent")
    assert stream.model.name == str(folder / "other/model")
    assert stream.seeds == (7,) and stream.general is not None


def test_a_model_path_may_be_relative_to_the_file(folder):
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "stream.yaml").write_text(TEXT.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "models/mine"))
    assert read_stream(folder / "stream.yaml").model.name == str(folder / "models/mine")


WRONG = {
    "an unknown field": (
        {"sedes": [0]},
        r"unknown field 'sedes'; legal are .*data, task_defaults\. Did you mean 'seeds'\?",
    ),
    "an unknown field of a task": (
        {"tasks": [{"name": "a", "path": "data/intent", "metrc": "f1"}]},
        r"tasks\[0\]: unknown field 'metrc'; legal are name, metric, path.* Did you mean 'metric'\?",
    ),
    "an unknown default": ({"task_defaults": {"lenght": 3}}, "unknown field of task_defaults 'lenght'; legal are"),
    "a missing model": ({"model": None}, "model: must be .*, got None"),
    "tasks twice": (
        {"tasks": [{"name": "a", "path": "data/intent"}, {"name": "a", "dataset": "x"}]},
        "tasks contains 'a' more than once",
    ),
    "methods twice": (
        {"methods": ["fggm", {"name": "fggm"}]},
        "methods contains 'fggm' more than once; give them different labels",
    ),
    "no tasks": ({"tasks": []}, "tasks is empty"),
    "no methods": ({"methods": []}, "methods is empty"),
    "tasks that are no list": ({"tasks": {"name": "a"}}, "tasks: must be a list"),
    "a missing folder": (
        {"tasks": [{"name": "a", "path": "data/none"}]},
        r"tasks\[0\]: path: no folder .*data/none",
    ),
    "a file": ({"tasks": [{"name": "a", "path": "data/code/test.jsonl"}]}, "path: no folder .*test.jsonl"),
    "an unknown split": (
        {"tasks": [{"name": "a", "path": "data/code", "split": {"tset": "train"}}]},
        r"split\.tset: must be 'train' or 'test', got 'tset'",
    ),
    "a missing text": ({"general": {"text": "none.txt"}}, r"general\.text: .*none.txt: cannot be read"),
    "a missing model folder": ({"model": "./none"}, "model: no folder .*none"),
    "an unknown metric": (
        {"tasks": [{"name": "a", "path": "data/intent", "metric": "./rouge"}]},
        r"tasks\[0\]\.metric: unknown metric './rouge'; known are 'accuracy'",
    ),
    "no data": ({"tasks": [{"name": "a"}]}, "needs exactly one of path .* and dataset"),
    "two kinds of data": (
        {"tasks": [{"name": "a", "path": "data/intent", "dataset": "x"}]},
        "needs exactly one of path",
    ),
    "half of the templates": ({"tasks": [{"name": "a", "path": "data/intent", "prompt": "{{ x }}"}]}, "give both"),
    "a template of nothing": (
        {"tasks": [{"name": "a", "path": "data/intent", "prompt": "x", "answer": "y"}]},
        r"prompt: 'x' is the same for every row; a template contains columns, such as \{\{ x \}\}",
    ),
    "a broken template": (
        {"tasks": [{"name": "a", "path": "data/intent", "prompt": "{{ x ", "answer": "{{ y }}"}]},
        "prompt: not a Jinja template",
    ),
    "code in a file": ({"tasks": [{"name": "a", "rows": "os.system"}]}, "rows: must be callable"),
    "trust in a file": (
        {"model": {"name": "x", "trust_remote_code": True}},
        "model: a file cannot set trust_remote_code",
    ),
    "an unknown order": ({"orders": ["radnom:3"]}, "unknown order 'radnom:3'; legal are given, reversed, random:SEED"),
    "an order without a seed": ({"orders": ["random"]}, "unknown order 'random'"),
    "an order that leaves a task out": (
        {"orders": [["intent", "code"]]},
        r"unknown order \(.intent., .code.\); legal are given, .* all tasks: intent, code, sums",
    ),
    "an order twice": ({"orders": ["given", "given"]}, "orders contains 'given' more than once"),
    "a number that is none": (
        {"training": {"epochs": "many"}},
        "training.epochs: must be a valid number, .*got 'many'",
    ),
    "half a seed": ({"seeds": [0.5]}, r"seeds\[0\]: must be a valid integer, .*got 0.5"),
    "truth for a number": ({"training": {"batch_size": True}}, "batch_size: must be a valid integer, got True"),
    "an infinite rate": ({"learning_rates": ["inf"]}, r"learning_rates\[0\]: must be a finite number, got 'inf'"),
    "a negative rate": ({"learning_rates": [-1e-4]}, r"learning_rates\[0\]: must be greater than 0, got -0.0001"),
    "no epochs": ({"training": {"epochs": 0}}, "training.epochs: must be greater than 0, got 0"),
    "a large seed": ({"seeds": [2**32]}, r"seeds\[0\]: must be less than 4294967296"),
    "a schedule that needs more arguments": ({"training": {"schedule": "greedy"}}, "schedule: must be 'linear', .*got"),
    "an unknown schedule": ({"training": {"schedule": "liner"}}, "training.schedule: must be 'linear', .*got 'liner'"),
    "an unknown dtype": (
        {"model": {"name": "x", "dtype": "float8"}},
        "model.dtype: must be 'auto', .*got 'float8'",
    ),
    "a name that is no folder": ({"tasks": [{"name": "a/b", "path": "data/intent"}]}, "it names a folder"),
    "a method without a name": ({"methods": [{"label": "x"}]}, r"methods\[0\]\.name is missing"),
    "an unknown method": ({"methods": ["fgm"]}, r"methods\[0\]: unknown method 'fgm'.* Did you mean 'fggm'\?"),
    "an unknown option of a method": (
        {"methods": ["sft", {"name": "fggm", "densty": 0.1}]},
        r"methods\[1\]: the method 'fggm' has no option 'densty'; legal are .* Did you mean 'density'\?",
    ),
    "an illegal option of a method": ({"methods": [{"name": "fggm", "density": 2}]}, r"methods\[0\]: density must be"),
    "an option of a wrong type": (
        {"methods": [{"name": "ewc", "decay": "x"}]},
        r"methods\[0\]: decay must be of type",
    ),
    "an unknown field of the model": ({"model": {"name": "x", "dtyp": "auto"}}, "model: unknown field 'dtyp'.*'dtype'"),
    "a quantized model": (
        {"model": {"name": "x", "quantization": "4bit"}},
        "changes the weights of the model, which is quantized",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_file_raises_a_one_line_error_that_names_file_and_field(case, settings, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes, message = WRONG[case]
    (folder / "wrong.json").write_text(json.dumps(settings | {"orders": ["given"]} | changes))
    with pytest.raises(StreamError, match=message) as error:
        read_stream(folder / "wrong.json")
    assert str(error.value).startswith(f"{folder / 'wrong.json'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "model: x\ntasks: [a\nmethods: b\n", r"a\.yaml: cannot be read: .* line 3"),
        ("a.json", '{"model": "x",\n "tasks": [}', r"a\.json: cannot be read: .* line 2"),
        ("a.yaml", "- model", "must have fields"),
        ("a.yaml", "", "must have fields"),
    ],
)
def test_a_syntax_error_names_the_file_and_the_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(StreamError, match=message) as error:
        read_stream(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_raises_an_error_that_lists_the_built_in_streams():
    with pytest.raises(StreamError, match=r"no file 'none.yaml'; ready streams are .*trace-order1"):
        read_stream("none.yaml")


def test_missing_test_data_raises_an_error_before_training(settings, folder):
    (folder / "data/intent/test.json").unlink()
    with pytest.raises(DataError, match=r"data/intent"):
        read_stream(settings).tasks[0].examples("test", byte_tokenizer())


# --- orders --------------------------------------------------------------------------------------


def names(order) -> list[str]:
    return [task.name for task in order.tasks]


def test_each_order_has_a_name_and_all_tasks(folder):
    given, backwards, drawn, listed = read_stream(folder / "stream.yaml").task_orders()
    assert (given.name, names(given)) == ("given", ["intent", "code", "sums"])
    assert (backwards.name, names(backwards)) == ("reversed", ["sums", "code", "intent"])
    assert (listed.name, names(listed)) == ("code,sums,intent", ["code", "sums", "intent"])
    assert drawn.name == "random:3" and sorted(names(drawn)) == ["code", "intent", "sums"]


def small_stream(count=6, **fields) -> Stream:
    tasks = tuple(Task(name=f"task{n}", dataset="x") for n in range(count))
    return Stream(**{"model": BaseModel("x"), "tasks": tasks, "methods": ("sft",)} | fields)


def test_a_random_order_depends_only_on_its_seed_and_the_names():
    stream = small_stream(orders=tuple(f"random:{seed}" for seed in range(8)))
    orders = [names(order) for order in stream.task_orders()]
    assert len({tuple(order) for order in orders}) > 5
    shuffled = stream.model_copy(update={"tasks": stream.tasks[::-1]})
    assert [names(order) for order in shuffled.task_orders()] == orders
    # fixed values, because no version of Python or of this package may draw other orders
    assert orders[3] == ["task3", "task5", "task0", "task1", "task2", "task4"]


# --- fingerprints --------------------------------------------------------------------------------


def test_the_same_files_in_another_folder_have_the_same_digest(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy") / "stream"
    shutil.copytree(folder, copy)
    first, second = read_stream(folder / "stream.yaml"), read_stream(copy / "stream.yaml")
    assert first.fingerprint() == second.fingerprint() and changes(first, second) == []


CHANGES = {
    "model.name": lambda s: s | {"model": "another/model"},
    "tasks.intent.metric": lambda s: s | {"task_defaults": s["task_defaults"] | {"metric": "rouge_l"}},
    "tasks.code.epochs": lambda s: s | {"tasks": [s["tasks"][0], s["tasks"][1] | {"epochs": 4}, s["tasks"][2]]},
    "tasks.sums.split": lambda s: s | {"tasks": [*s["tasks"][:2], s["tasks"][2] | {"split": "train"}]},
    "training.batch_size": lambda s: s | {"training": s["training"] | {"batch_size": 4}},
    "general": lambda s: {name: value for name, value in s.items() if name != "general"},
    "order": lambda s: s | {"tasks": s["tasks"][::-1]},
}


@pytest.mark.parametrize("field", CHANGES)
def test_the_digest_contains_what_determines_results_and_differences_are_named(field, settings):
    stream, changed = read_stream(settings), read_stream(CHANGES[field](settings))
    assert stream.fingerprint() != changed.fingerprint()
    assert any(line.startswith(field) for line in changes(stream, changed))
    if field not in ("general", "tasks.intent.metric"):
        assert len(changes(stream, changed)) == 1


@pytest.mark.parametrize("file", ["intent/train.json", "intent/test.json", "code/test.jsonl", "general.txt"])
def test_changed_data_changes_the_digest(file, folder):
    before = read_stream(folder / "stream.yaml").fingerprint()
    with (folder / "data" / file).open("a") as opened:
        opened.write(" ")
    stream = read_stream(folder / "stream.yaml")
    [line] = changes(stream, before)
    assert line.split(":")[0] in ("tasks.intent.data", "tasks.code.data", "general.text") and "content" in line


def test_the_digest_contains_the_weights_of_a_model_folder(folder):
    (folder / "model").mkdir()
    (folder / "model/model.safetensors").write_bytes(b"1")
    stream = read_stream(folder / "stream.yaml", model=str(folder / "model"))
    before = stream.fingerprint()
    (folder / "model/model.safetensors").write_bytes(b"2")
    assert stream.fingerprint() != before


def test_settings_that_distinguish_runs_are_not_in_the_digest(settings):
    more = {"methods": ["ewc"], "seeds": [9], "orders": ["reversed"], "learning_rates": [1e-3]}
    assert read_stream(settings).fingerprint() == read_stream(settings | more).fingerprint()


def test_temporary_files_are_not_in_the_digest(folder):
    before = read_stream(folder / "stream.yaml").fingerprint()
    for name in ("cache-12.arrow", ".train.json.swp", "README.md"):
        (folder / "data/intent" / name).write_text("x")
    assert read_stream(folder / "stream.yaml").fingerprint() == before


def test_a_saved_fingerprint_can_be_compared(settings):
    stream = read_stream(settings)
    saved = json.loads(json.dumps(stream.fingerprint()))
    assert changes(stream, saved) == []
    saved["training"]["epochs"] = 3
    saved["training"]["gone"] = True
    assert changes(stream, saved) == ["training.epochs: 1.0 instead of 3", "training.gone: missing instead of true"]


def test_whole_numbers_are_the_same_from_python_and_from_a_file():
    assert (
        small_stream(training=Training(epochs=1)).fingerprint()
        == small_stream(training=Training(epochs=1.0)).fingerprint()
    )


# --- examples ------------------------------------------------------------------------------------


def test_the_loss_covers_the_answer_and_the_texts_are_kept_for_the_metric(folder):
    tokenizer = byte_tokenizer()
    task = read_stream(folder / "stream.yaml").tasks[0]
    examples = task.examples("test", tokenizer)
    assert len(examples) == 6
    assert split_by_loss(examples[4], tokenizer) == ("Utterance 4:", " intent 1<eos>")
    assert list(examples.sources) == [row["prompt"] for row in INTENTS[:6]]
    assert list(examples.references) == [row["answer"] for row in INTENTS[:6]]


def test_templates_create_prompt_and_answer_from_any_columns(folder):
    tokenizer = byte_tokenizer()
    examples = read_stream(folder / "stream.yaml").tasks[1].examples("test", tokenizer)
    assert split_by_loss(examples[0], tokenizer) == ("t\n", "u<eos>")


def task_of(rows, **fields) -> Task:
    return Task(name="made", rows=lambda split: rows, **fields)


def test_the_output_of_a_template_is_not_interpreted():
    evil = "{{ ''.__class__ }}{% for x in y %}<b>&"
    task = task_of([{"x": evil, "my column": "z"}], prompt="{{ x }} {{ row['my column'] }}", answer="{{ x | upper }}")
    examples = task.examples("test", byte_tokenizer())
    assert (examples.sources[0], examples.references[0]) == (f"{evil} z", evil.upper())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ z }}", r"fail on row 1 of the rows of made: 'z' is undefined; its columns are x, n"),
        ("{{ x.__class__.__mro__ }}", "row 1 .*unsafe"),
        ("{{ 1 / n }}", "row 1 .*ZeroDivisionError: division by zero"),
        ("{{ x + n }}", "row 1 .*TypeError"),
        ("{{ none_at_all.y }}", "row 1 .*undefined"),
        ("{{ row.update(x=1) }}", "row 1 .*unsafe"),
        ("{{ none }}", "row 1 .*a value is null"),
    ],
)
def test_a_template_that_fails_names_the_row_and_its_columns(template, message):
    task = task_of([{"x": "text", "n": 0}], prompt=template, answer="{{ x }}")
    with pytest.raises(DataError, match=message):
        task.examples("test", byte_tokenizer())


def test_a_function_can_return_the_rows_of_each_split():
    task = Task(name="made", rows=lambda split: ({"prompt": split, "answer": str(n)} for n in range(3)))
    assert list(task.examples("test", byte_tokenizer()).references) == ["0", "1", "2"]
    assert set(task.examples("train", byte_tokenizer()).sources) == {"train"}
    stream = small_stream(tasks=(task,))
    other = Task(name="made", rows=lambda split: [{"prompt": split, "answer": "4"}])
    assert changes(stream, stream.model_copy(update={"tasks": (other,)}))[0].startswith("tasks.made.data: content")


def test_a_mapping_may_mix_python_tasks_and_files(settings):
    stream = read_stream(settings | {"tasks": [task_of(INTENTS), *settings["tasks"][1:]], "orders": ["given"]})
    assert [task.name for task in stream.tasks] == ["made", "code", "sums"]


def test_the_chat_template_applies_to_tokens_but_not_to_texts():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    examples = task_of([{"prompt": "Say", "answer": "hi"}], chat_template=True).examples("test", tokenizer)
    assert split_by_loss(examples[0], tokenizer) == ("[user]Say<eos>[assistant]", "hi<eos>")
    assert (examples.sources[0], examples.references[0]) == ("Say", "hi")


def test_a_long_prompt_is_truncated_on_the_left_and_the_answer_is_kept():
    tokenizer = byte_tokenizer()
    examples = task_of([{"prompt": "abcdef", "answer": "xyz"}], max_prompt_length=2, max_answer_length=4).examples(
        "test", tokenizer
    )
    assert split_by_loss(examples[0], tokenizer) == ("ef", "xyz<eos>")


def test_truncated_answers_are_counted_and_reported():
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "p", "answer": "x" * length} for length in (2, 3, 4, 9)]
    with pytest.warns(UserWarning, match=r"2 of 4 answers of made \(test\) have more than 4 tokens"):
        examples = task_of(rows, max_answer_length=4).examples("test", tokenizer)
    lost = [not split_by_loss(row, tokenizer)[1].endswith("<eos>") for row in examples]
    assert lost == [False, False, True, True]
    assert examples.references[3] == "x" * 9


def test_the_seed_shuffles_and_samples_only_training_rows():
    rows = [{"prompt": str(n), "answer": "x"} for n in range(50)]
    task, tokenizer = task_of(rows, limit=20, test_limit=10), byte_tokenizer()
    train = [list(task.examples("train", tokenizer, seed).sources) for seed in (0, 0, 1)]
    assert train[0] == train[1] and set(train[0]) != set(train[2]) and len(train[0]) == 20
    assert train[0] != sorted(train[0], key=int)
    test = [list(task.examples("test", tokenizer, seed).sources) for seed in (0, 1)]
    assert test[0] == test[1] == sorted(test[0], key=int) and len(test[0]) == 10


def test_splits_may_have_other_names(folder):
    shutil.move(folder / "data/intent/test.json", folder / "data/intent/heldout.json")
    task = Task(name="a", path=str(folder / "data/intent"), split={"test": "heldout"})
    assert len(task.examples("test", byte_tokenizer())) == 6
    assert len(task.examples("train", byte_tokenizer())) == 20


# --- built-in streams ----------------------------------------------------------------------------

TRACE_EPOCHS = dict(
    zip(
        ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"],
        [5, 3, 7, 5, 3, 5, 5, 7],
        strict=True,
    )
)


@pytest.mark.parametrize("name", ["trace-order1", "trace-order2"])
def test_the_trace_streams_can_be_read_if_their_data_exists(name, tmp_path):
    for task in TRACE_EPOCHS:
        write_rows(tmp_path / task / "train.json", INTENTS)
        write_rows(tmp_path / task / "test.json", INTENTS)
    stream = read_stream(name, data=tmp_path, model="Qwen/Qwen2-1.5B")
    assert {task.name: stream.training_of(task).epochs for task in stream.tasks} == TRACE_EPOCHS
    assert all(task.metric in METRICS for task in stream.tasks)
    assert stream.training.learning_rate == 1e-5 and stream.model.name == "Qwen/Qwen2-1.5B"


def test_the_built_in_streams_are_found_by_name():
    assert ready_streams() == ["demo", "trace-order1", "trace-order2"]


def test_the_orders_agree_with_trace(tmp_path):
    for task in TRACE_EPOCHS:
        write_rows(tmp_path / task / "train.json", INTENTS)
        write_rows(tmp_path / task / "test.json", INTENTS)
    first, second = (read_stream(f"trace-order{n}", data=tmp_path) for n in (1, 2))
    assert [task.name for task in first.tasks] == list(TRACE_EPOCHS)
    assert [task.name for task in second.tasks] == (
        ["NumGLUE-cm", "NumGLUE-ds", "FOMC", "20Minuten", "Py150", "MeetingBank", "ScienceQA", "C-STANCE"]
    )
    differing = changes(first, second)
    assert len(differing) == 1 and differing[0].startswith("order")


def test_a_built_in_stream_without_data_raises_an_error_with_the_searched_folder():
    with pytest.raises(StreamError, match=r"no folder .*C-STANCE\. Paths of tasks are relative to data"):
        read_stream("trace-order1")


def test_a_method_may_have_its_own_learning_rates_which_the_command_line_overrides(settings):
    settings |= {"methods": ["frozen", {"name": "sft", "learning_rates": [3e-4]}], "learning_rates": [1e-4, 2e-4]}
    rates = {(run.method.label, run.learning_rate) for run in runs_of(read_stream(settings))}
    assert rates == {("frozen", 1e-4), ("frozen", 2e-4), ("sft", 3e-4)}
    overridden = runs_of(read_stream(settings, learning_rates=[5e-4]))
    assert {(run.method.label, run.learning_rate) for run in overridden} == {("frozen", 5e-4), ("sft", 5e-4)}
    with pytest.raises(StreamError, match="must be greater than 0"):
        read_stream(settings | {"methods": ["frozen", {"name": "sft", "learning_rates": [0]}]})


def test_a_preset_brings_its_learning_rate_unless_the_file_sets_one(settings):
    settings |= {"methods": ["sft", {"name": "fggm", "preset": "retain", "reference": "self"}], "learning_rates": []}
    settings["training"].pop("learning_rate", None)
    runs = runs_of(read_stream(settings))
    assert {(run.method.label, run.learning_rate) for run in runs} == {("sft", 2e-4), ("fggm", 1.6e-3)}
    settings["training"]["learning_rate"] = 3e-4
    assert {run.learning_rate for run in runs_of(read_stream(settings))} == {3e-4}
