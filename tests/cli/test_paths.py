"""Paths and names of the user: expanded once, checked before the work, and shown as they are."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from command_line import fail, fggm, succeed
from models import byte_tokenizer, llama
from streams import settings, write_stream
from transformers import AutoTokenizer

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """The home directory, beside the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_home_directory_is_expanded_in_every_option(folder, home):
    for name in ("model", "data"):
        shutil.copytree(folder / name, home / name)
    (home / "text.txt").write_text("A text.")
    few = ("--num-samples=4", "--density=0.2")
    succeed("select", "~/model", "--data=~/data", "--output=~/s", *few, "--save-scores")
    assert names(home / "s") == ADAPTER | {"fggm_scores.safetensors"}
    assert "not empty" in fail("select", "~/model", "--data=~/data", "--output=~/s")
    train = ("--adapter=~/s", "--output=~/t", "--eval-data=~/data", "--eval-split=test", "--max-steps=2")
    succeed("train", "~/model", "--data=~/data/train.json", *train, "--learning-rate=0.1", "--warmup-steps=0")
    found = succeed("eval", "~/model", "--data=~/data", "-a~/t")
    assert [row["adapter"] for row in found["results"]] == [None, str(home / "t")]
    succeed("merge", "~/model", "--adapter=~/t", "--output=~/m", "--ledger=~/l")
    succeed("rollback", "~/l", "t", "--model=~/m", "--output=~/r")
    succeed("diff", "~/model", "~/m", "--output=~/d")
    succeed("export", "~/t", "--base=~/model", "--output=~/e")
    succeed("inspect", "~/t", "--base=~/model")
    succeed("overlap", "~/s", "~/t")
    succeed("reference", "~/model", "--text=~/text.txt", "--output=~/c")
    options = ("--criterion=gain_per_harm", "--reference=~/s", "--config=~/s/adapter_config.json")
    succeed("select", "~/model", "--data=~/data", "--output=~/u", *few, *options)
    assert not list(home.parent.joinpath("work").iterdir())
    assert {name for name in names(home) if name[0] != "."} == {*"stmrldecu", "model", "data", "text.txt"}


def test_the_home_directory_is_expanded_in_a_stream(home):
    write_stream(home)
    fields = settings(Path("~"), methods=["sft"], data="~")
    fields["tasks"] = [{**task, "path": task["name"]} for task in fields["tasks"]]
    fields["general"] = {"text": "~/general.txt"}
    (home / "stream.json").write_text(json.dumps(fields))
    succeed("sequence", "~/stream.json", "--output=~/out", "--model=~/model", "--data=~")
    assert {"report.json", "stream.json", "runs"} <= names(home / "out")
    assert not list(home.parent.joinpath("work").iterdir())


# --- outputs -------------------------------------------------------------------------------------

COMMANDS = {
    "select": ("/missing", "--data", "/missing"),
    "train": ("/missing", "--data", "/missing"),
    "merge": ("/missing", "-a", "ADAPTER"),
    "merge --ledger": ("/missing", "-a", "ADAPTER"),
    "diff": ("/missing", "/missing"),
    "export": ("ADAPTER",),
    "reference": ("/missing", "--text", "/missing"),
    "sequence": ("STREAM",),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file/x", "file", "circle", "a" * 300, "/proc/here"])
def test_an_output_that_cannot_be_written_is_an_error_before_the_work(command, place, folder, selected, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    stream = settings(folder, methods=["sft"], general=None)
    for task in stream["tasks"]:
        task["path"] = str(folder / "data")
    (tmp_path / "stream.json").write_text(json.dumps(stream))
    replaced = {"ADAPTER": selected, "STREAM": tmp_path / "stream.json"}
    words = [replaced.get(word, word) for word in COMMANDS[command]]
    name, *option = command.split()
    outputs = ["--output", tmp_path / "free", *option, tmp_path / place] if option else ["--output", tmp_path / place]
    message = fail(name, *words, *outputs)
    assert message.startswith("the output ") and ("cannot be written" in message or "is a file" in message)
    assert names(tmp_path) == {"file", "circle", "stream.json"} and (tmp_path / "file").read_text() == "mine"


def test_outputs_may_be_links_to_another_disk(folder, selected, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        for name in ("s", "m", "l", "e", "d", "t"):
            (tmp_path / name).symlink_to(Path(disk) / name)
        few = ("--data", folder / "data", "--num-samples", 4)
        succeed("select", folder / "model", *few, "-o", tmp_path / "s")
        succeed("train", folder / "model", *few, "-o", tmp_path / "t", "--max-steps", 2, "--save-steps", 1)
        succeed("merge", folder / "model", "-a", tmp_path / "t", "-o", tmp_path / "m", "--ledger", tmp_path / "l")
        succeed("rollback", tmp_path / "l", "t", "--model", tmp_path / "m", "-o", tmp_path / "m", "--overwrite")
        succeed("export", tmp_path / "t", "--base", folder / "model", "-o", tmp_path / "e")
        assert names(Path(disk)) == {"s", "m", "l", "e", "t"} and names(Path(disk) / "s") == ADAPTER


def test_a_sequence_does_not_write_into_a_folder_of_the_user(tmp_path):
    write_stream(tmp_path)
    (tmp_path / "stream.json").write_text(json.dumps(settings(tmp_path, methods=["frozen"])))
    for name in ("report.md", "report.json", "report.html", "notes.txt"):
        mine = tmp_path / f"for {name}"
        mine.mkdir()
        (mine / name).write_text("mine")
        for options in ((), ("--resume",)):
            assert "is not empty" in fail("sequence", tmp_path / "stream.json", "-o", mine, *options)
        assert names(mine) == {name} and (mine / name).read_text() == "mine"


def test_long_names_of_tasks_labels_and_orders_are_shortened(tmp_path):
    write_stream(tmp_path)
    fields = settings(tmp_path, methods=[{"name": "sft", "label": "é" * 200}], orders=["given", ["plus" * 90, "minus"]])
    fields["tasks"][0]["name"] = "plus" * 90
    (tmp_path / "s.json").write_text(json.dumps(fields))
    found = succeed("sequence", tmp_path / "s.json", "-o", tmp_path / "out")
    assert {run["label"] for run in found["runs"]} == {"é" * 200} and found["runs"][0]["tasks"][0] == "plus" * 90
    succeed("sequence", tmp_path / "s.json", "-o", tmp_path / "out", "--resume")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run[v2]", "run[/1]", "[bold]run", ":smile:", "run[link=x]", "base"])
def test_names_are_shown_as_they_are(name, folder, selected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(selected, tmp_path / name)
    assert name in fggm("inspect", name).out
    assert name.rpartition("/")[2] in fggm("overlap", name, selected).out
    (tmp_path / "text.txt").write_text("A text.")
    shown = fggm("reference", folder / "model", "--text", "text.txt", "-o", f"{name}-r")
    assert shown.code == 0 and f"{name}-r" in shown.out
    shown = fggm("select", folder / "model", "--criterion", "random", "-o", f"{name}-s")
    assert shown.code == 0 and shown.out.count(f"{name}-s") == 2


def test_every_adapter_has_its_own_row(folder, selected, trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "base")
    found = succeed("eval", folder / "model", "-d", folder / "data", "-a", "base", "-a", selected, "-a", "base")[
        "results"
    ]
    assert [row["adapter"] for row in found] == [None, "base", str(selected), "base"]
    losses = [row["loss"] for row in found]
    assert losses[0] == losses[2] != losses[1] == losses[3]
    shown = fggm("eval", folder / "model", "-d", folder / "data", "-a", "base").out
    assert all(f"{loss:.4f}" in shown for loss in losses[:2])


def test_the_tokenizer_is_saved_as_it_was_loaded(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    llama(vocab=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    succeed("select", tmp_path / "base", "--criterion", "random", "-o", tmp_path / "a")
    ledger = ("--ledger", tmp_path / "ledger")
    succeed("merge", tmp_path / "base", "-a", tmp_path / "a", "-o", tmp_path / "merged", *ledger)
    succeed("rollback", tmp_path / "ledger", "a", "--model", tmp_path / "merged", "-o", tmp_path / "without")
    for name in ("merged", "without"):
        assert AutoTokenizer.from_pretrained(tmp_path / name).pad_token is None
        saved, own = (json.loads((tmp_path / each / "tokenizer_config.json").read_text()) for each in (name, "base"))
        assert {key: saved[key] for key in own} == own
        assert (tmp_path / name / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
