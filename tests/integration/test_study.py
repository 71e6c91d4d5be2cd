"""The study's scripts write legal data, its streams are readable and alike, and it runs with tuned rates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from streams import settings, write_stream
from study import page
from study import run as study

from fggm_peft.continual.reading import read_stream

FOLDER = Path(study.__file__).parent
NAMES = ["tuning", *(f"retention-{name}" for name in study.STREAMS)]
PACKAGES = {
    "code": [],
    "intents": [],
    "generation": ["babel", "inflect"],
    "mixed": ["babel", "num2words", "pycountry", "pint"],
    "tuning": ["babel", "num2words"],
}


def fields_of(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def tasks_of(stream: str) -> list[str]:
    return [task["path"] for task in fields_of("tuning" if stream == "tuning" else f"retention-{stream}")["tasks"]]


def prepare(folder: Path, stream: str, *options: object) -> None:
    command = [sys.executable, FOLDER / "prepare.py", folder, "--no-model", "--only", stream, *options]
    subprocess.run([str(part) for part in command], check=True, timeout=300)


@pytest.mark.parametrize("stream", PACKAGES)
def test_the_data_have_the_promised_size(stream, tmp_path):
    for package in PACKAGES[stream]:
        pytest.importorskip(package)
    options = []
    if stream == "intents":
        intent = tmp_path / "source"
        intent.mkdir()
        for split, count in (("train", 100), ("eval", 20), ("test", 30)):
            rows = [{"prompt": f"{split} {n} {k}", "answer": f" intent {n}"} for n in range(20) for k in range(count)]
            (intent / f"{split}.json").write_text(json.dumps(rows))
        options = ["--intent", intent]
    prepare(tmp_path / "data", stream, *options)
    for task in tasks_of(stream):
        train, test = (json.loads((tmp_path / "data" / task / f"{s}.json").read_text()) for s in ("train", "test"))
        assert (len(train), len(test)) == (640, 200)
        assert all(row.keys() == {"prompt", "answer"} and row["answer"].strip() for row in train + test)
        if stream != "code":  # two files of the standard library may have the same lines
            assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    if stream == "intents":
        answers = [
            {row["answer"] for row in json.loads((tmp_path / "data" / t / "train.json").read_text())}
            for t in tasks_of(stream)
        ]
        assert sum(map(len, answers)) == len(set.union(*answers)) == 20


def test_the_streams_are_legal_and_have_the_same_methods_and_training(tmp_path):
    data = write_stream(tmp_path)
    row = json.dumps([{"prompt": "a", "answer": "b"}])
    for text in ("reference", "other"):
        (data / f"{text}.txt").write_text("A text to retain.\n")
    for name in NAMES:
        for task in fields_of(name)["tasks"]:
            (data / task["path"]).mkdir(exist_ok=True)
            for split in ("train", "test"):
                (data / task["path"] / f"{split}.json").write_text(row)
    tuning, *others = (read_stream(FOLDER / f"{name}.yaml", data=data, model=data / "model") for name in NAMES)
    for stream in others:
        assert stream.methods == tuning.methods and stream.training == tuning.training
        assert stream.seeds == (1, 2, 3) and stream.orders == ("given", "reversed")
        assert not {task.name for task in stream.tasks} & {task.name for task in tuning.tasks}
        assert all(task.limit * stream.training.epochs / stream.training.batch_size >= 80 for task in stream.tasks)
        assert {task.test_limit for task in stream.tasks} == {200}
    assert tuning.seeds == (0,)
    plan = yaml.safe_load(study.RATES.read_text())
    labels = [method.label for method in tuning.methods]
    assert list(plan["rates"]) == labels and set(plan["once"]) < set(labels)
    assert {len(rates) for rates in plan["rates"].values()} == {3}


def test_the_best_rate_is_harmless_if_the_method_has_a_harmless_rate():
    runs = [
        {"learning_rate": 1e-4, "op": 0.5, "other": 0.01},
        {"learning_rate": 2e-4, "op": 0.7, "other": 0.04},
        {"learning_rate": 4e-4, "op": 0.8, "other": 0.06},
    ]
    assert study.best_rate(runs) == 2e-4
    assert study.best_rate([{**run, "other": 1.0} for run in runs]) == 4e-4
    assert study.best_rate([{**run, "op": 0.5, "other": None} for run in runs]) == 1e-4


def test_every_method_runs_with_its_tuned_rate(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    data = write_stream(tmp_path / "data")
    fields = settings(data, methods=["sft", "frozen"], training={"max_steps": 1, "batch_size": 4})
    for name, own in (("tuning", {}), ("retention-code", {"seeds": [1, 2], "orders": ["given", "reversed"]})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**fields, **own}))
    (tmp_path / "rates.yaml").write_text(
        yaml.safe_dump({"once": ["frozen"], "rates": {"sft": [1e-5, 1e-4, 1e-3], "frozen": [1e-5, 1e-4, 1e-3]}})
    )
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "RATES", tmp_path / "rates.yaml")
    monkeypatch.setattr(study, "STREAMS", ("code",))
    monkeypatch.setattr(sys, "argv", ["run.py", str(data), "--output", str(tmp_path / "runs"), "--streams", "code"])
    study.main()
    runs = json.loads((tmp_path / "runs" / "code" / "report.json").read_text())["runs"]
    assert sorted((run["label"], run["seed"], run["order"]) for run in runs) == [
        ("frozen", 1, "given"),
        *(("sft", seed, order) for seed in (1, 2) for order in ("given", "reversed")),
    ]
    tuning = json.loads((tmp_path / "runs" / "tuning" / "report.json").read_text())["runs"]
    best = {label: study.best_rate([run for run in tuning if run["label"] == label]) for label in ("sft", "frozen")}
    assert len(tuning) == 6 and {run["label"]: run["learning_rate"] for run in runs} == best
    assert not list(tmp_path.glob("runs/*/runs/*/*/tasks")) and list(tmp_path.glob("runs/*/runs/*/*/run.json"))
    assert "frozen: the best rate 1e-05 is at the end" in capsys.readouterr().err

    monkeypatch.setattr(study, "run_stream", None)  # everything is finished
    study.main()


def test_the_pages_show_the_committed_runs():
    for path, text in page.pages().items():
        assert path.read_text("utf-8") == text
