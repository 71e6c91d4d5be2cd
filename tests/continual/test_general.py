"""General ability: the loss of a text against a direct computation."""

from __future__ import annotations

import json

import pytest
import torch
from models import byte_tokenizer, text_model
from streams import settings, write_stream

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream
from fggm_peft.continual.settings import StreamError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


@torch.no_grad()
def loss_by_hand(model, paragraphs) -> float:
    total, count = 0.0, 0
    for paragraph in paragraphs:
        ids = torch.tensor([byte_tokenizer()(paragraph + "<eos>")["input_ids"]])  # plain text ends with the end token
        logits = model.double()(ids).logits.log_softmax(-1)
        total -= float(logits[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def test_a_run_measures_the_mean_loss_over_the_tokens_of_the_text_after_each_task(folder, tmp_path):
    results = {r["label"]: r for r in run_stream(read_stream(settings(folder, methods=["fggm", "frozen"])), tmp_path)}
    expected = loss_by_hand(text_model(), ["A text about nothing.", "And another one."])
    assert results["frozen"]["general_losses"] == [pytest.approx(expected, rel=1e-5)] * 3
    assert results["frozen"]["general"] == 0
    losses = results["fggm"]["general_losses"]
    assert results["fggm"]["general"] == losses[2] - losses[0]
    entries = json.loads(next(tmp_path.glob("runs/fggm/*/tasks.json")).read_text())
    assert losses == [entry["general_loss"] for entry in entries] and len(set(losses)) == 3


def test_a_second_text_is_measured_in_the_same_way(folder, tmp_path):
    (tmp_path / "other.txt").write_text("Something else.\n")
    general = {"text": str(folder / "general.txt"), "other": str(tmp_path / "other.txt")}
    stream = read_stream(settings(folder, methods=["sft", "frozen"], general=general))
    assert stream.fingerprint()["general"].keys() == {"text", "other"}
    trained, frozen = run_stream(stream, tmp_path / "runs")
    assert frozen["other_losses"] == [pytest.approx(loss_by_hand(text_model(), ["Something else."]), rel=1e-5)] * 3
    assert trained["other"] == trained["other_losses"][2] - trained["other_losses"][0] != 0
    assert trained["general"] == trained["general_losses"][2] - trained["general_losses"][0] != trained["other"]


def test_kl_is_measured_on_the_test_answers_of_each_new_task(folder, tmp_path):
    general = {"text": str(folder / "general.txt"), "kl": True}
    stream = read_stream(settings(folder, methods=["sft", "frozen"], general=general))
    trained, frozen = run_stream(stream, tmp_path)
    assert frozen["kl"] == 0 and frozen["divergences"] == [0, 0]
    assert trained["kl"] == sum(trained["divergences"]) / 2 > 0
    entries = json.loads(next(tmp_path.glob("runs/sft/*/tasks.json")).read_text())
    assert [entry["kl"] for entry in entries[1:]] == trained["divergences"]


def test_an_empty_text_is_an_error(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(StreamError, match=r"general\.text: .* is empty"):
        read_stream(settings(folder, general={"text": str(tmp_path / "empty.txt")}))


def test_an_unknown_field_is_an_error(folder):
    with pytest.raises(StreamError, match=r"general: unknown field 'lm_eval'; legal are text"):
        read_stream(settings(folder, general={"text": str(folder / "general.txt"), "lm_eval": ["hellaswag"]}))
