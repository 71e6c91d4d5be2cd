"""General ability: the loss of a text, and lm_eval tasks against a direct computation."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from models import adapted, byte_tokenizer, quantized, text_model

from fggm_peft.continual import lm_eval_tasks
from fggm_peft.continual.general import General, GeneralAbility, general_change
from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream
from fggm_peft.continual.settings import StreamError
from fggm_peft.continual.stream import differences

pytest.importorskip("lm_eval")

DOCUMENTS = [
    {"question": f"{n} and {n}:", "choices": [f"{2 * n} of them", str(n), "none at all"], "answer": n % 3}
    for n in range(9)
]
TASK = """
task: doubles
tag: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
{metrics}
"""
GROUP = """
group: arithmetic
task: [doubles, doubles_plain]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
PERPLEXITY = """
task: sayings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
UNSCORED = "group: unscored\ntask: [doubles, doubles_plain]\n"
BROKEN = "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.json}}\ntest_split: test\n"


def metrics(*names: str) -> str:
    return "".join(f"  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with lm_eval tasks over a local file, a text, a model, and a task to train."""
    folder = tmp_path_factory.mktemp("general")
    data = folder / "tasks" / "documents.json"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    plain = TASK.format(data=data, metrics=metrics("acc")).replace("doubles", "doubles_plain")
    files = {
        "doubles": TASK.format(data=data, metrics=metrics("acc", "acc_norm")),
        "plain": plain.replace("tag: numbers\n", "tag: [numbers]\n"),
        "group": GROUP,
        "sayings": PERPLEXITY.format(data=data),
        "gone": BROKEN,
        "unscored": UNSCORED,
    }
    for name, text in files.items():
        (data.parent / f"{name}.yaml").write_text(text)
    (folder / "general.txt").write_text("A text about nothing.\n\nAnd another one.\n")
    byte_tokenizer().save_pretrained(folder / "model")
    text_model().save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} plus one is ", "answer": str(n + 1)} for n in range(10, 26)]
    (folder / "plus").mkdir()
    for split in ("train", "test"):
        (folder / "plus" / f"{split}.json").write_text(json.dumps(rows[: 4 if split == "test" else 16]))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_tasks(folder):
    """Add the tasks of the folder to those of lm_eval."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lm_eval_tasks, "_task_manager", lambda: manager)
        yield


def general(*tasks: str, **fields) -> General:
    return General(lm_eval=tasks, **fields)


def sharp_model(**config):
    """A random model with large logits, so that its answers differ."""
    model = text_model(**config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@torch.no_grad()
def log_likelihood(model, context: str, continuation: str) -> float:
    ids = torch.tensor([byte_tokenizer()(context + continuation)["input_ids"]])
    length = len(byte_tokenizer()(continuation)["input_ids"])
    logits = model.double()(ids).logits.log_softmax(-1)
    return float(logits[0, :-1].gather(-1, ids[0, 1:, None])[-length:].sum())


def accuracy_by_hand(model, documents, by_length: bool) -> float:
    correct = []
    for row in documents:
        scores = [log_likelihood(model, row["question"], f" {choice}") for choice in row["choices"]]
        if by_length:
            scores = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        correct.append(scores.index(max(scores)) == row["answer"])
    return sum(correct) / len(correct)


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 4])
def test_a_score_is_the_accuracy_of_the_log_likelihoods_of_the_choices(limit, folder):
    model = sharp_model()
    ability = GeneralAbility(general("doubles", "doubles_plain", lm_eval_limit=limit), byte_tokenizer(), 4)
    found = ability.measure(model)
    documents = DOCUMENTS[:limit]
    assert found["loss"] is None
    by_length, plain = (pytest.approx(accuracy_by_hand(model, documents, by_length)) for by_length in (True, False))
    assert found["tasks"] == {
        "doubles": {"value": by_length, "metric": "acc_norm"},
        "doubles_plain": {"value": plain, "metric": "acc"},
    }


def test_the_two_accuracies_of_this_model_differ():
    """Otherwise the test above could not distinguish the metrics."""
    values = {by_length: accuracy_by_hand(sharp_model(), DOCUMENTS, by_length) for by_length in (False, True)}
    assert values[False] != values[True] and 0 < values[True] < 1


def test_a_group_has_the_score_that_lm_eval_computes(folder):
    model = sharp_model()
    group = GeneralAbility(general("arithmetic"), byte_tokenizer()).measure(model)
    expected = pytest.approx(accuracy_by_hand(model, DOCUMENTS, by_length=False))
    assert group["tasks"] == {"arithmetic": {"value": expected, "metric": "acc"}}


def test_a_task_without_accuracy_has_its_first_metric(folder):
    score = GeneralAbility(general("sayings"), byte_tokenizer()).measure(text_model())["tasks"]["sayings"]
    assert score["metric"] == "word_perplexity" and score["value"] > 1


def test_the_loss_is_the_mean_over_the_tokens_of_the_text(folder):
    model = sharp_model()
    found = GeneralAbility(General(text=str(folder / "general.txt")), byte_tokenizer(), 1).measure(model)
    total, count = 0.0, 0
    for paragraph in ("A text about nothing.", "And another one."):
        text = paragraph + "<eos>"  # plain text ends with the end token
        total -= log_likelihood(model, text[0], text[1:])
        count += len(byte_tokenizer()(text)["input_ids"]) - 1
    assert found == {"loss": pytest.approx(total / count, rel=1e-5), "tasks": {}}


def test_between_tasks_only_the_text_is_measured(folder):
    watched = general("doubles", text=str(folder / "general.txt"))
    found = GeneralAbility(watched, byte_tokenizer()).measure(text_model(), between_tasks=True)
    assert found["loss"] > 0 and not found["tasks"]
    assert GeneralAbility(None, byte_tokenizer()).measure(text_model()) == {"loss": None, "tasks": {}}


# --- changes -------------------------------------------------------------------------------------


def entry(loss=None, **tasks) -> dict:
    return {"loss": loss, "tasks": {name: {"value": value, "metric": "m"} for name, value in tasks.items()}}


def test_changes_are_differences_of_the_final_model_from_the_base():
    measured = [entry(2.0, a=0.5), entry(3.5), entry(3.0), entry(2.5, a=0.375)]
    assert general_change(measured) == {
        "change": 0.5,
        "losses": [2.0, 3.5, 3.0, 2.5],
        "tasks": {"a": {"metric": "m", "base": 0.5, "final": 0.375, "change": -0.125}},
    }


def test_without_a_text_its_change_is_none():
    assert general_change([entry(a=5.0), entry(a=4.0)])["change"] is None


def test_without_measurements_there_is_no_change():
    assert general_change([entry(), entry()]) is None


# --- no side effects -----------------------------------------------------------------------------


def drawn() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_measuring_does_not_change_the_model(folder):
    model = adapted(text_model(tie_word_embeddings=True), criterion="random", density=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    ability = GeneralAbility(general("doubles", text=str(folder / "general.txt")), tokenizer, batch_size=3)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = drawn()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    configs = str(model.config), str(model.generation_config)
    levels = [logging.getLogger(name).level for name in (None, "lm_eval", "transformers", "datasets")]
    handlers = list(logging.getLogger().handlers), list(logging.getLogger("lm_eval").handlers)

    first = ability.measure(model)

    assert drawn() == expected
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (str(model.config), str(model.generation_config)) == configs
    assert [logging.getLogger(name).level for name in (None, "lm_eval", "transformers", "datasets")] == levels
    assert (list(logging.getLogger().handlers), list(logging.getLogger("lm_eval").handlers)) == handlers
    assert tokenizer.padding_side == "left" and model.active_adapters == ["default"]
    assert ability.measure(model) == first


def test_failed_measuring_does_not_change_the_model(folder, monkeypatch):
    model = text_model().train()
    ability = GeneralAbility(general("doubles"), byte_tokenizer())
    level = logging.getLogger("lm_eval").level
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ability.measure(model)
    assert model.training and torch.rand(1) == expected and logging.getLogger("lm_eval").level == level


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_four_bit_layers_are_not_repacked(kind, folder):
    model = quantized(text_model(), kind)
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # pretend that the CPU has the kernel
    weights = [layer.weight.data.clone() for layer in layers]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
        GeneralAbility(general("doubles", lm_eval_limit=2), byte_tokenizer()).measure(model)
    assert layers and all(layer.support_avx512bf16_for_cpu for layer in layers)
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight.data, weight)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


# --- in a stream ---------------------------------------------------------------------------------


def settings(folder, **watched) -> dict:
    return {
        "model": str(folder / "model"),
        "methods": ["fggm", "frozen"],
        "tasks": [
            {"name": name, "path": str(folder / "plus"), "metric": "edit_similarity", "max_answer_length": 4}
            for name in ("one", "two")
        ],
        "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "general": {"lm_eval": ["doubles"], **watched},
    }


def test_a_run_measures_tasks_at_both_ends_and_the_text_after_each_task(folder, tmp_path):
    stream = read_stream(settings(folder, text=str(folder / "general.txt")))
    results = {result["label"]: result["general"] for result in run_stream(stream, tmp_path)}
    assert len(results["fggm"]["losses"]) == 3 and results["fggm"]["change"] != 0
    ledger = json.loads(next(tmp_path.glob("runs/fggm/*/tasks.json")).read_text())
    assert [bool(entry["general"]["tasks"]) for entry in ledger] == [True, False, True]
    assert results["frozen"]["change"] == 0 and results["frozen"]["tasks"]["doubles"]["change"] == 0
    assert results["frozen"]["tasks"]["doubles"]["base"] == pytest.approx(
        accuracy_by_hand(text_model(), DOCUMENTS, by_length=True)
    )


def test_fields_of_a_stream_file_set_what_is_measured(folder):
    watched = {"lm_eval": ["doubles", "arithmetic"], "lm_eval_limit": 100}
    assert read_stream(settings(folder, **watched)).general == general("doubles", "arithmetic", lm_eval_limit=100)


WRONG = {
    "nothing": ({"lm_eval": []}, "general: give text .* lm_eval .* or both"),
    "an unknown task": (
        {"lm_eval": ["doubels"]},
        r"general: lm_eval: no task 'doubels' in lm_eval. Did you mean 'doubles'\?",
    ),
    "a tag": ({"lm_eval": ["numbers"]}, "lm_eval: 'numbers' is a tag, which has no score; name its tasks"),
    "a task twice": ({"lm_eval": ["doubles", "doubles"]}, "lm_eval contains a task more than once"),
    "no examples": ({"lm_eval_limit": 0}, "general.lm_eval_limit: must be greater than or equal to 1, got 0"),
    "an option without tasks": (
        {"text": "general.txt", "lm_eval": [], "lm_eval_limit": 1},
        "lm_eval_limit has no effect, because lm_eval is empty",
    ),
    "one name": ({"lm_eval": "doubles"}, "general.lm_eval: must be a list, got 'doubles'"),
    "an unknown field": ({"lm_evl": []}, "general.lm_evl: unknown field; .*Did you mean 'lm_eval'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_settings_raise_a_one_line_error_when_the_stream_is_read(case, folder, monkeypatch):
    monkeypatch.chdir(folder)
    changes, message = WRONG[case]
    with pytest.raises(StreamError, match=message) as error:
        read_stream(settings(folder, **changes))
    assert "\n" not in str(error.value)


def test_an_unknown_task_suggests_the_closest_lm_eval_task():
    with pytest.raises(ValueError, match=r"no task 'helaswag' in lm_eval\. Did you mean 'hellaswag'\?"):
        General(lm_eval=("helaswag",))


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    def missing():
        raise ImportError("No module named 'lm_eval'")

    monkeypatch.setattr(lm_eval_tasks, "_task_manager", missing)
    with pytest.raises(ValueError, match=r"pip install fggm-peft\[general\]"):
        General(lm_eval=("hellaswag",))


@pytest.mark.parametrize(
    ("name", "message"), [("gone", "cannot load gone: "), ("unscored", "the group 'unscored' has no score")]
)
def test_tasks_that_cannot_be_scored_stop_a_run_before_its_first_step(name, message, folder, tmp_path):
    stream = read_stream(settings(folder, lm_eval=[name]))
    with pytest.raises(StreamError, match=f"general.lm_eval: {message}") as error:
        list(run_stream(stream, tmp_path))
    assert "\n" not in str(error.value)


def test_an_empty_text_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(StreamError, match=r"general\.text: .* is empty"):
        GeneralAbility(General(text=str(tmp_path / "empty.txt")), byte_tokenizer())


def test_the_digest_contains_everything_that_determines_the_scores(folder, tmp_path):
    plain = read_stream(settings(folder))
    limited = read_stream(settings(folder, lm_eval_limit=3))
    assert differences(limited.fingerprint(), plain.fingerprint()) == ["general.lm_eval_limit: 3 instead of null"]
