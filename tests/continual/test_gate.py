"""Gates: what happens when a new task reduces the score of an earlier task too much."""

from __future__ import annotations

import json

import pytest
import torch
from streams import settings, state, write_stream

from fggm_peft.continual.reading import read_stream
from fggm_peft.continual.run import run_stream
from fggm_peft.continual.runner import Runner, learned
from fggm_peft.continual.settings import StreamError
from fggm_peft.continual.stream import Gate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stream(tmp_path_factory.mktemp("stream"))


def falling(monkeypatch, falls) -> None:
    """Scores without a model: 1, except ``falls(last trained task)`` for the first task."""
    trained: list[str] = []
    train, evaluate = Runner._train, Runner._evaluate

    def noted(self, model, method, number, name, tasks):
        trained.append(name)
        return train(self, model, method, number, name, tasks)

    def scored(self, model, count):
        entry = evaluate(self, model, count)
        scores = dict.fromkeys(entry["scores"], 1.0)
        if trained:
            scores[self.tasks[0].name] = falls(trained[-1])
        return {**entry, "scores": scores}

    monkeypatch.setattr(Runner, "_train", noted)
    monkeypatch.setattr(Runner, "_evaluate", scored)


def gated(folder, action: str, **fields):
    return read_stream(settings(folder, gate={"keep": {"plus": 0.9}, "action": action}, **fields))


def test_a_gate_stops_the_run_after_the_task_that_violates_it(folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last: 0.5 if last == "minus" else 1.0)
    three = [*settings(folder)["tasks"], {**settings(folder)["tasks"][1], "name": "again"}]
    stream = gated(folder, "stop", methods=["sft"], tasks=three)
    (result,) = run_stream(stream, tmp_path)
    assert result["tasks"] == ["plus", "minus"] and result["R"] == [[1.0, 1.0], [0.5, 1.0]]
    assert result["bwt"] == -0.5
    assert result["gate"] == [{"task": "minus", "earlier": "plus", "score": 0.5, "needed": 0.9, "action": "stopped"}]


@pytest.mark.parametrize("method", ["sft", "fggm", "ewc", {"name": "lora", "r": 2, "mode": "carried"}])
def test_a_rolled_back_task_leaves_model_and_method_bit_exact(method, folder, tmp_path, monkeypatch):
    falling(monkeypatch, lambda last: 0.5 if last == "minus" else 1.0)
    states = {}
    keep = Runner._save_state

    def remembered(self, model, method, ledger):
        states[ledger[-1]["task"]] = state(model, method)
        keep(self, model, method, ledger)

    monkeypatch.setattr(Runner, "_save_state", remembered)
    monkeypatch.setattr(Runner, "_kl", lambda self, model, count: float(sum(p.abs().sum() for p in model.parameters())))
    (result,) = run_stream(gated(folder, "rollback", methods=[method]), tmp_path)
    assert states["plus"].keys() == states["minus"].keys()
    assert all(torch.equal(states["minus"][name], value) for name, value in states["plus"].items())
    assert [event["action"] for event in result["gate"]] == ["rolled back"] and len(result["R"]) == 2
    ledger = json.loads(next(tmp_path.rglob("tasks.json")).read_text())
    assert ledger[2]["kl"] == ledger[1]["kl"]
    assert ledger[2]["parameters"] == ledger[2]["bytes"] == 0 and ledger[2]["training_seconds"] > 0


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"keep": {}}, "gate.keep is empty"),
        ({"keep": {"plus": 1.5}}, r"gate.keep.plus: must be less than or equal to 1, got 1.5"),
        ({"keep": {"plus": 0.9}, "action": "rollbck"}, "gate.action: must be 'stop' or 'rollback', got 'rollbck'"),
        ({"keep": {"pluss": 0.9}}, "unknown task in gate.keep: 'pluss'.*Did you mean 'plus'"),
    ],
)
def test_an_invalid_gate_is_rejected(gate, message, folder):
    with pytest.raises(StreamError, match=message):
        read_stream(settings(folder, gate=gate))


def test_a_gate_checks_only_earlier_tasks():
    gate = Gate(keep={"a": 0.9, "*": 0.5})
    ledger = [{"task": None, "scores": {"a": 0.0}}, {"task": "a", "scores": {"a": 0.8, "b": 0.0}}]
    assert learned(ledger) == {"a": 0.8}
    assert gate.violations(learned(ledger), {"a": 0.73, "b": 0.0}) == []
    assert gate.violations({"a": 0.8, "b": 1.0}, {"a": 0.71, "b": 0.4}) == [
        {"earlier": "a", "score": 0.71, "needed": pytest.approx(0.72)},
        {"earlier": "b", "score": 0.4, "needed": 0.5},
    ]
