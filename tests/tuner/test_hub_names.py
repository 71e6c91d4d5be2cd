"""Names that are neither a local folder nor a repository on the Hub."""

from __future__ import annotations

import socket
from pathlib import Path

import huggingface_hub
import pytest
from command_line import fail

from fggm_peft.core.errors import AdapterFileError
from fggm_peft.deltas import SparseDelta
from fggm_peft.deltas.base_model import Weights
from fggm_peft.tuner.files.hub import may_be_hub_id

PATHS = ["./nothere", "../nothere", "~/nothere", "/nothere", "a/b/nothere", "a b/nothere", "runs/nothere/"]
COMMANDS = {
    "inspect": ["{}"],
    "overlap": ["{}", "{}"],
    "merge": ["model", "--adapter", "{}", "--output", "out"],
    "export": ["{}", "--output", "out"],
    "eval": ["model", "--data", "data", "--adapter", "{}"],
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_cannot_be_a_hub_id(name):
    assert not may_be_hub_id(name)


@pytest.mark.parametrize("name", ["me/delta", "me/delta-2.b_c", "gpt2"])
def test_names_with_at_most_one_slash_may_be_hub_ids(name):
    assert may_be_hub_id(name)


@pytest.mark.parametrize("command", list(COMMANDS))
@pytest.mark.parametrize("name", PATHS)
def test_a_command_names_a_missing_folder_without_using_the_network(name, command, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fail(command, *(argument.format(name) for argument in COMMANDS[command]))
    assert str(Path(name).expanduser().absolute()) in message and "Hub id" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("read", [SparseDelta.read, Weights])
@pytest.mark.parametrize("name", PATHS)
def test_the_library_does_not_look_up_a_path_on_the_hub(name, read, no_network):
    with pytest.raises((AdapterFileError, FileNotFoundError), match=r"there is no folder .*nothere.*be a Hub id"):
        read(name)


@pytest.mark.parametrize("read", [SparseDelta.read, Weights])
def test_the_error_names_the_folder_when_the_hub_cannot_be_reached(read, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((AdapterFileError, FileNotFoundError)) as caught:
        read("runs/nothere")
    assert f"there is no folder {tmp_path / 'runs' / 'nothere'}, and it cannot be loaded from the Hub" in str(
        caught.value
    )


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_command_names_a_missing_folder_before_loading_anything(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = fail(command, *(argument.format("runs/nothere") for argument in COMMANDS[command]))
    assert f"there is no folder {tmp_path / 'runs' / 'nothere'}, and it cannot be loaded from the Hub" in message


def test_a_folder_can_be_given_relative_to_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "delta").mkdir()
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        SparseDelta.read("~/delta")
