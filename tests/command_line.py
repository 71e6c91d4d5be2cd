"""Runs ``fggm`` commands in this process, and provides a small model, a task and adapters for them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import byte_tokenizer, llama

from fggm_peft.cli.app import run_program

PAIRS = [{"prompt": f"{n} plus one is", "answer": f" {n + 1}"} for n in range(40)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with a model and a byte-level tokenizer in ``model``, and a task in ``data``."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    model = llama(vocab=len(tokenizer), max_position_embeddings=256)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.json").write_text(json.dumps(PAIRS[:32]))
    (folder / "data" / "test.json").write_text(json.dumps(PAIRS[32:]))
    return folder


def fggm(*arguments: object) -> SimpleNamespace:
    """Run a command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_program([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def succeed(*arguments: object) -> dict:
    """Run a command with ``--json``; standard output must be one JSON object."""
    result = fggm(*arguments, "--json")
    assert result.code == 0, result.err[-3000:]
    return json.loads(result.out)


def fail(*arguments: object, code: int = 1) -> str:
    """Run a command that must fail with a one-line error; returns the error."""
    result = fggm(*arguments)
    assert (result.code, result.out) == (code, "")
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("fggm: error: ") and "Traceback" not in result.err
    return last.removeprefix("fggm: error: ")


@pytest.fixture(scope="session")
def selected(folder) -> Path:
    succeed("select", folder / "model", "--data", folder / "data", "--output", folder / "selected", "--density", 0.2)
    return folder / "selected"


@pytest.fixture(scope="session")
def trained(folder, selected) -> Path:
    """An adapter that has been selected and trained."""
    output = folder / "trained"
    succeed(
        *("train", folder / "model", "--data", folder / "data", "--adapter", selected, "--output", output),
        *("--learning-rate", 1e-2, "--max-steps", 4, "--max-length", 64),
    )
    return output
