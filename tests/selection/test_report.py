"""The report of a selection: its cost, its checks, and their plots."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from command_line import fail, succeed
from models import adapted, fggm_layers, llama, t5, token_batches

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.plots import density_plot, regret_plot, to_svg
from fggm_peft.selection.report import RegretCheck
from fggm_peft.training.trainer import log_entry

MANY = token_batches(sizes=(8,) * 9)


def texts(figure) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", to_svg(figure, "plot"))


# Contents ----------------------------------------------------------------------------------------


def test_the_report_contains_the_cost_of_the_selection():
    report = select_parameters(adapted(llama()), token_batches(), num_samples=6, progress=False)
    assert (report.samples, report.sample_passes) == (6, 6) and report.seconds > 0
    result = report.to_dict()
    assert result["sample_passes"] == 6 and result["seconds"] == report.seconds
    assert "6 sample passes" in " ".join(str(report).split())
    json.dumps(result)


def test_the_cost_includes_a_reference_and_repeated_passes():
    model = adapted(llama(), "column", criterion="gain_per_harm")
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1)]
    report = select_parameters(
        model, token_batches(), None, reference=text, score_memory=96 * 8 * 2 * 8, progress=False
    )
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


# Plots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, t5])
def test_a_report_has_a_density_plot_and_a_regret_plot(build):
    model = adapted(build(), target_modules="all-linear")
    report = select_parameters(model, MANY[:5], progress=False)
    result = dict(report.plots())
    assert list(result) == ["density", "regret"]
    assert {"selected share", "layer"} <= set(texts(result["density"]))
    assert {"samples", "32", "regret"} <= set(texts(result["regret"]))


def test_a_report_without_regrets_has_only_a_density_plot():
    report = select_parameters(adapted(llama()), token_batches(), num_samples=None, progress=False)
    assert [name for name, _ in report.plots()] == ["density"]
    unknown = [RegretCheck("task", 32, None)]  # every score is 0
    result = dataclasses.replace(report, checks=unknown, samples=32)
    assert [name for name, _ in result.plots()] == ["density"]


@pytest.mark.parametrize("layers", [1, 2, 12, 30, 126])
def test_labels_of_a_density_plot_do_not_overlap(layers):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
    shares = {f"model.layers.{n}.{kind}": (n / layers, 100) for n in range(layers) for kind in kinds}
    figure = density_plot(shares | {"lm_head": (0.5, 100)})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert boxes and not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_density_plot_of_one_module_and_of_an_empty_support():
    assert ".25" in texts(density_plot({"classifier": (0.25, 4)}))
    assert "0" in texts(density_plot({"classifier": (0.0, 4)}))


def test_a_regret_plot_skips_unknown_regrets():
    figure = regret_plot({"a": [(32, None), (64, 0.5)], "b": [(32, 0.6), (128, 0.1)], "none": [(32, None)]})
    assert "none" not in texts(figure) and {"a", "b"} <= set(texts(figure))


def test_select_writes_the_plots_of_its_report(folder, tmp_path):
    report = succeed(
        *("select", folder / "model", "-d", folder / "data", "-o", tmp_path / "out", "--density", 0.2),
        *("--plots", tmp_path / "plots"),
    )
    names = ["density.svg", "regret.svg"]
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == names
    assert sorted(report["pictures"]) == [str(tmp_path / "plots" / name) for name in names]


def test_select_rejects_an_unusable_plot_folder_before_loading_the_model(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    common = ("select", "no/model", "--data", "x", "--output", tmp_path / "out")
    assert "not empty" in fail(*common, "--plots", tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_the_checks_survive_in_the_config_of_the_adapter(tmp_path):
    model = adapted(llama())
    select_parameters(model, MANY[:5], progress=False)
    model.save_pretrained(tmp_path)
    config = FGGMConfig.from_pretrained(str(tmp_path))
    assert config.selection == model.peft_config["default"].selection
    assert len(torch.cat([layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()]))
