"""A README that is in the way never costs the adapter, and its text is never lost."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import adapted, llama
from peft import PeftModel

from fggm_peft.deltas import SparseDelta, save_adapter

CARD = b"""---
license: mit
tags:
- fggm
- mine
datasets: [a, b]
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {name: d, type: d}
    metrics: [{type: accuracy, value: 1}]
---

# My adapter

What I know about it.
"""


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted(llama(), criterion="random", init_weights=False, density=0.1)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(CARD)), st.binary(max_size=3)), min_size=1, max_size=4))
@example(changes=[(12, b"[")])
@example(changes=[(250, b"\xff")])
@example(changes=[(0, b"\x00")])
def test_a_mutated_card_is_updated_or_renamed(model, changes, tmp_path):
    content = bytearray(CARD)
    for position, replacement in changes:
        content[position : position + len(replacement) or position + 1] = replacement
    check(model, bytes(content), tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "x: [",
        "- a list",
        "5",
        "1: 2",
        "tags: 5",
        "tags: {a: b}",
        "license: [a]",
        "base_model: {a: 1}",
        "model-index: 3",
    ],
)
def test_a_header_of_another_form_is_updated_or_renamed(model, header, tmp_path):
    check(model, f"---\n{header}\n---\n\nMine.\n".encode(), tmp_path)


def check(model, content: bytes, folder) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "README.md").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_adapter(model, folder)
    assert SparseDelta.read(folder).parameters == SparseDelta.read(model).parameters
    assert "fggm_peft" in (folder / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in folder.iterdir()} - {"adapter_config.json", "adapter_model.safetensors"}
    if names != {"README.md"}:
        assert names == {"README.md", "README.old.md"} and (folder / "README.old.md").read_bytes() == content


def test_a_renamed_card_is_reported(model, tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nx: [\n---\n")
    with pytest.warns(UserWarning, match=r"README.md cannot be updated and is renamed to README\.old\.md"):
        save_adapter(model, tmp_path)
