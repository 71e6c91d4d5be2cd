"""The report of a selection: its cost and its checks."""

from __future__ import annotations

import json

import pytest
import torch
from models import adapted, fggm_layers, llama, token_batches

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.training.trainer import log_entry

MANY = token_batches(sizes=(8,) * 9)


# Contents ----------------------------------------------------------------------------------------


def test_the_report_contains_the_cost_of_the_selection():
    report = select_parameters(adapted(llama()), token_batches(), num_samples=6, progress=False)
    assert (report.samples, report.sample_passes) == (6, 6) and report.seconds > 0
    result = report.to_dict()
    assert result["sample_passes"] == 6 and result["seconds"] == report.seconds
    assert "6 sample passes" in " ".join(str(report).split())
    json.dumps(result)
    shown = report._repr_mimebundle_()  # in a notebook
    assert "trainable values" in shown["text/plain"] and "<pre" in shown["text/html"]


def test_the_cost_includes_a_reference_and_repeated_passes():
    model = adapted(llama(), "column", criterion="gain_per_harm", score_memory=96 * 8 * 2 * 8)
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1)]
    report = select_parameters(model, token_batches(), None, reference=text, progress=False)
    groups = report.sample_passes // 16
    assert groups > 1 and report.sample_passes == groups * (report.samples + report.reference_samples) == groups * 16
    log = log_entry(report)
    assert log["selection/sample_passes"] == groups * 16
    assert all(isinstance(value, (int, float)) for value in log.values())


def test_report_and_config_contain_every_check_of_the_automatic_number_of_samples():
    model = adapted(llama())
    report = select_parameters(model, MANY, progress=False)
    assert [(check.data, check.samples) for check in report.checks] == [
        ("task", 8),
        ("task", 16),
        ("task", 32),
        ("task", 64),
    ]
    assert all(0.02 < check.regret < 1 for check in report.checks)
    assert report.samples == 72  # the data ran out
    assert model.peft_config["default"].selection["checks"] == [[c.samples, c.regret] for c in report.checks]
    # a check has the regret that a selection with its number of samples reports
    alone = select_parameters(adapted(llama()), MANY, num_samples=32, progress=False)
    assert alone.regret == pytest.approx(report.checks[2].regret) and not alone.checks


def test_checks_of_reference_and_task_are_distinguished():
    model = adapted(llama(), "column", criterion="gain_per_harm", regret=1e-6)
    report = select_parameters(model, MANY[:5], reference=MANY[5:9], progress=False)
    checks = [(check.data, check.samples) for check in report.checks]
    assert checks == [(data, n) for data in ("reference", "task") for n in (8, 16, 32)]


def test_the_checks_survive_in_the_config_of_the_adapter(tmp_path):
    model = adapted(llama())
    select_parameters(model, MANY[:5], progress=False)
    model.save_pretrained(tmp_path)
    config = FGGMConfig.from_pretrained(str(tmp_path))
    assert config.selection == model.peft_config["default"].selection
    assert len(torch.cat([layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()]))
