"""Output is written as a whole or not at all, within its own file system, and is checked before the work starts."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from fggm_peft.tuner.files.atomic import complete_folder, file_name, partial_file, require_writable, write_json


@pytest.fixture
def other_disk(tmp_path):
    """A folder in another file system."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path) -> None:
    with complete_folder(folder) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("new")


def test_a_folder_is_written_through_a_link_to_another_disk(other_disk, tmp_path):
    (tmp_path / "link").symlink_to(other_disk)
    (tmp_path / "dangling").symlink_to(other_disk / "missing")
    for name in ("link", "link/new/folder", "dangling"):
        write(tmp_path / name)
        assert files(tmp_path / name) == files((tmp_path / name).resolve())
        assert {"a": "new", "sub/b": "new"}.items() <= files(tmp_path / name).items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link"]


def test_the_temporary_folder_is_in_the_output_folder(tmp_path):
    with complete_folder(tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path / "out"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["new", "new/er", "old", "."])
def test_nothing_remains_of_a_folder_that_fails(name, error, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").write_text("mine")
    with pytest.raises(error), complete_folder(tmp_path / name) as temporary:
        (temporary / "a").write_text("new")
        raise error
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["old", "old/mine"]


def test_a_check_leaves_nothing_and_keeps_what_is_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "new/er", "empty", "."):
        require_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, message in [("file", "is a file"), ("file/x", "Not a directory"), ("circle", "cannot be written")]:
        with pytest.raises(OSError, match=rf"{name} .*{message}|{message}.*{name}"):
            require_writable(tmp_path / name)
    with pytest.raises(OSError, match=r"cannot be written: .*File name too long"):
        require_writable(tmp_path / ("a" * 300))
    with pytest.raises(OSError, match="cannot be written"):
        require_writable(Path("/proc/here"))


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write(Path("~/out"))
    write_json(Path("~/a.json"), 1)
    assert files(tmp_path) == {"home/out/a": "new", "home/out/sub/b": "new", "home/a.json": "1"}


# --- a full disk ---------------------------------------------------------------------------------


def save_on_a_full_disk(file: Path, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        with partial_file(file) as partial:
            torch.save({"a": torch.zeros(10_000), "b": torch.zeros(3)}, partial)
    except OSError as error:
        is_clear = "the disk is full" in str(error) and error.errno == errno.ENOSPC and str(file) in str(error)
        os._exit(17 if is_clear else 18)
    os._exit(19)


@pytest.mark.parametrize("size", [0, 100, 8_342, 30_000])
def test_a_full_disk_is_reported_as_one(size, tmp_path):
    (tmp_path / "state.pt").write_text("old")
    child = get_context("fork").Process(target=save_on_a_full_disk, args=(tmp_path / "state.pt", size))
    child.start()
    child.join(60)
    assert child.exitcode == 17 and files(tmp_path) == {"state.pt": "old"}


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes differ"), KeyboardInterrupt()])
def test_other_errors_of_a_file_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, partial_file(tmp_path / "a") as partial:
        partial.write_text("x")
        raise error
    assert raised.value is error and not list(tmp_path.iterdir())


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a" * 121, "é" * 200, "task," * 100, "任务" * 99, "a" * 120 + "b"])
def test_long_names_are_shortened_to_different_names(text, tmp_path):
    names = {file_name(text), file_name(text + "x"), file_name(text + "y")}
    assert len(names) == 3 and all(len(name.encode()) <= 120 for name in names)
    (tmp_path / file_name(text)).mkdir()


def test_short_names_stay(tmp_path):
    assert [file_name(name) for name in ("a", "random3", "é" * 60)] == ["a", "random3", "é" * 60]


def test_several_processes_may_write_a_file_at_the_same_time(tmp_path):
    file = tmp_path / "base.json"
    with partial_file(file) as first, partial_file(file) as second:
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]  # the outer context ends last
