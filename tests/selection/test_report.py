"""The report of a selection: its cost, its checks, its spectra, and their plots."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from command_line import fail, succeed
from models import adapted, fisher_scores, llama, t5, token_batches
from reference import sorted_spectrum

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.deltas.saved_selection import saved_adapter
from fggm_peft.plots import agreement_plot, density_plot, overlap_plot, spectrum_plot, to_svg
from fggm_peft.selection.report import AgreementCheck
from fggm_peft.training.trainer import log_entry
from fggm_peft.tuner.support import fggm_layers

MANY = token_batches(sizes=(8,) * 9)


def texts(figure) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", to_svg(figure, "plot"))


# --- what the report says ------------------------------------------------------------------------


def test_the_report_says_what_the_selection_cost():
    report = select_parameters(adapted(llama()), token_batches(), num_samples=6, progress=False)
    assert (report.num_samples, report.samples, report.sample_passes, report.backward) == (6, 6, 6, True)
    assert report.samples_per_second == pytest.approx(6 / report.seconds)
    assert report.reference_share == 0 and "6 sample passes (forward and backward)" in report.cost
    found = report.to_dict()
    assert found["num_samples"] == 6 and found["samples_per_second"] == report.samples_per_second
    assert "6 sample passes" in " ".join(str(report).split())
    json.dumps(found)


def test_a_reference_and_repeated_passes_are_counted_too():
    model = adapted(llama(), "column", criterion="gain_per_harm")
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1)]
    report = select_parameters(
        model, token_batches(), None, reference=text, score_memory=96 * 8 * 2 * 8, progress=False
    )
    groups = report.sample_passes // 16
    assert groups > 1 and report.sample_passes == groups * (report.samples + report.reference_samples) == groups * 16
    assert 0 < report.reference_share < 1 and "for the reference" in report.cost
    log = log_entry(report)
    assert log["selection/sample_passes"] == groups * 16 and 0 < log["selection/reference_share"] < 1
    assert all(isinstance(value, (int, float)) for value in log.values())


@pytest.mark.parametrize(("criterion", "kind"), [("output_magnitude", "(forward)"), ("random", "no pass over data")])
def test_a_pass_without_a_backward_says_so(criterion, kind):
    report = select_parameters(adapted(llama(), criterion=criterion), token_batches(), progress=False)
    assert kind in report.cost and not report.backward
    assert all(max(module.spectrum) > 0 for module in report.modules)


def test_every_check_of_auto_is_kept_and_the_adapter_remembers_them():
    model = adapted(llama())
    report = select_parameters(model, MANY, progress=False)
    assert [(check.data, check.samples) for check in report.checks] == [("task", 32), ("task", 64)]
    assert all(0 < check.agreement < 0.8 for check in report.checks)
    assert report.samples == 72  # the data ran out
    assert report.agreements() == {
        "task": [(n, report.checks[k].agreement) for k, n in ((0, 32), (1, 64))] + [(72, report.agreement)]
    }
    assert model.peft_config["default"].selection["checks"] == [[c.samples, c.agreement] for c in report.checks]
    # the agreement of a check is what a selection from so many samples reports
    alone = select_parameters(adapted(llama()), MANY, num_samples=32, progress=False)
    assert alone.agreement == pytest.approx(report.checks[0].agreement) and not alone.checks


def test_checks_of_a_reference_are_told_from_those_of_the_task():
    model = adapted(llama(), "column", criterion="gain_per_harm")
    report = select_parameters(model, MANY[:5], reference=MANY[5:9], progress=False)
    assert [(check.data, check.samples) for check in report.checks] == [("reference", 32), ("task", 32)]
    assert report.agreements()["task"] == [(32, report.checks[1].agreement)]  # at the end another measure is taken


def test_spectra_are_of_the_scores_that_were_ranked(granularity):
    model = adapted(llama(), granularity)
    report = select_parameters(model, token_batches(), num_samples=None, progress=False)
    scores = fisher_scores(model, token_batches())
    for module in report.modules:
        exact = sorted_spectrum(scores[module.name])
        assert module.spectrum == pytest.approx(exact, rel=0.01)
        entries = module.shape[0] * module.shape[1]
        assert module.mean_score == pytest.approx(float(scores[module.name].double().sum()) / entries, rel=1e-4)
    assert "spectrum" not in report.to_pandas().columns


def test_the_card_has_a_table_where_densities_differ(tmp_path):
    model = adapted(llama(), density_pattern={"q_proj": 0.5})
    select_parameters(model, token_batches(), progress=False)
    model.save_pretrained(tmp_path / "differs")
    assert "| q_proj | 50 % | 50 % |" in (tmp_path / "differs" / "README.md").read_text()
    model = adapted(llama(), density=0.25)
    select_parameters(model, token_batches(), progress=False)
    model.save_pretrained(tmp_path / "even")
    card = (tmp_path / "even" / "README.md").read_text()
    assert "The share is the same in every module." in card and "| q_proj" not in card


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, t5])
def test_all_pictures_of_a_report(build):
    model = adapted(build(), target_modules="all-linear")
    report = select_parameters(model, MANY[:5], progress=False)
    found = dict(report.plots())
    assert list(found) == ["density", "spectrum", "agreement"]
    assert {"selected share", "layer"} <= set(texts(found["density"]))
    assert {"share of the rows, best first", "100 %"} <= set(texts(found["spectrum"]))
    assert {"samples", "32", "enough: 0.8"} <= set(texts(found["agreement"]))


def test_a_report_without_checks_or_scores_has_only_a_density():
    report = select_parameters(adapted(llama()), token_batches(), num_samples=None, progress=False)
    assert [name for name, _ in report.plots()] == ["density", "spectrum"]
    flat = [dataclasses.replace(module, spectrum=[0.0] * 65) for module in report.modules]
    assert [name for name, _ in dataclasses.replace(report, modules=flat).plots()] == ["density"]
    unknown = [AgreementCheck("task", 32, None)]  # everything is chosen
    found = dataclasses.replace(report, modules=flat, checks=unknown, samples=32)
    assert [name for name, _ in found.plots()] == ["density"]


@pytest.mark.parametrize("layers", [1, 2, 12, 30, 126])
def test_labels_of_a_density_picture_do_not_touch(layers):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")
    shares = {f"model.layers.{n}.{kind}": (n / layers, 100) for n in range(layers) for kind in kinds}
    figure = density_plot(shares | {"lm_head": (0.5, 100)})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert boxes and not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_density_picture_of_one_module_and_of_nothing_chosen():
    assert ".25" in texts(density_plot({"classifier": (0.25, 4)}))
    assert "0" in texts(density_plot({"classifier": (0.0, 4)}))


def test_a_spectrum_leaves_out_modules_without_scores_and_scores_of_zero():
    falling = [5.0] * 30 + [1.0] * 34 + [0.0]
    spectra = {"h.0.q": falling, "h.1.q": falling, "h.0.dead": [0.0] * 65}
    figure = spectrum_plot(spectra, dict.fromkeys(spectra, 0.1), "row")
    assert "q" in texts(figure) and "dead" not in texts(figure)
    assert all(y > 0 for line in figure.axes[0].lines for y in line.get_ydata())


def test_an_overlap_picture_has_chance_above_the_diagonal():
    figure = overlap_plot(["a", "b"], [[1.0, 0.3], [0.3, 1.0]], [[0.2, 0.18], [0.18, 0.2]])
    assert [text for text in texts(figure) if text[0] in ".1"] == ["1.0", ".18", ".30", "1.0"]


def test_agreements_that_are_not_known_are_bridged():
    figure = agreement_plot({"a": [(32, None), (64, 0.5)], "b": [(32, 0.6), (128, 0.9)], "none": [(32, None)]}, 0.8)
    assert "none" not in texts(figure) and {"a", "b"} <= set(texts(figure))


# --- of saved adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_shares_of_a_saved_adapter_are_those_of_its_report(granularity, task_type, tmp_path):
    config = {"density_pattern": {"q_proj": 0.5}, "task_type": task_type}
    model = adapted(llama(), granularity, **config)
    report = select_parameters(model, token_batches(), progress=False)
    model.save_pretrained(tmp_path / "adapter")
    adapter = saved_adapter(str(tmp_path / "adapter"))
    assert adapter.shares() == report.shares()


def test_plot_draws_one_adapter_with_what_its_files_have(folder, tmp_path):
    chosen, model = tmp_path / "chosen", folder / "model"
    report = succeed(
        *("select", model, "-d", folder / "data", "-o", chosen, "--density", 0.2, "--save-scores"),
        *("--plots", tmp_path / "at once", "--plots-format", "png"),
    )
    names = ["density", "spectrum", "agreement"]
    assert [file.name for file in sorted((tmp_path / "at once").iterdir())] == sorted(f"{n}.png" for n in names)
    assert report["pictures"] == [str(tmp_path / "at once" / f"{name}.png") for name in names]
    found = succeed("plot", chosen, "--output", tmp_path / "later")
    assert sorted(found["pictures"]) == sorted(f"{name}.svg" for name in names) and found["overlap"] is None
    assert {file.name for file in (tmp_path / "later").iterdir()} == set(found["pictures"])
    (entry,) = found["adapters"]
    assert entry["density"] == pytest.approx(report["density"]) and entry["left_out"] == {}
    assert entry["modules"] == {module["name"]: module["density"] for module in report["modules"]}
    assert "not empty" in fail("plot", chosen, "--output", tmp_path / "later")
    succeed("plot", chosen, "--output", tmp_path / "later", "--overwrite", "--format", "pdf")


def test_plot_compares_several_adapters(folder, selected, tmp_path):
    one, model = tmp_path / "one", folder / "model"
    succeed("select", model, "-o", one, "--criterion", "random", "--density", 0.5)
    found = succeed("plot", selected, one, "--output", tmp_path / "plots")
    expected = {"density-selected.svg", "density-one.svg", "overlap.svg", "agreement.svg"}
    assert set(found["pictures"]) == expected
    assert found["overlap"]["names"] == ["selected", "one"] and found["overlap"]["jaccard"][0][0] == 1
    assert found["overlap"]["jaccard"][0][1] == pytest.approx(found["overlap"]["chance"][0][1], abs=0.05)
    assert "no scores were saved" in found["adapters"][0]["left_out"]["spectrum"]
    assert set(found["adapters"][1]["left_out"]) == {"spectrum", "agreement"}
    columns = tmp_path / "columns"
    succeed("select", model, "-o", columns, "--criterion", "random", "--granularity", "column")
    mixed = succeed("plot", one, columns, "--output", tmp_path / "mixed")
    shares = [entry["density"] for entry in mixed["adapters"]]  # a row meets a column in one entry
    both = shares[0] * shares[1]
    assert mixed["overlap"]["jaccard"][0][1] == pytest.approx(both / (sum(shares) - both), rel=0.1)


def test_plot_refuses_what_it_cannot_draw(folder, selected, tmp_path):
    out = ("--output", tmp_path / "plots")
    assert "no adapter in" in fail("plot", tmp_path / "nothing", *out)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    assert "LORA adapter, not FGGM" in fail("plot", tmp_path / "lora", *out)
    adapted(llama(hidden_size=32), criterion="random").save_pretrained(tmp_path / "other")
    assert "different base models" in fail("plot", selected, tmp_path / "other", *out)
    assert not (tmp_path / "plots").exists()


def test_select_refuses_pictures_that_it_cannot_write_before_it_loads_the_model(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    common = ("select", "no/model", "--data", "x", "--output", tmp_path / "out")
    assert "not empty" in fail(*common, "--plots", tmp_path / "full")
    assert not (tmp_path / "out").exists()


def test_checks_that_a_stranger_wrote_are_left_out(tmp_path):
    model = adapted(llama(), criterion="random", task_type="CAUSAL_LM")
    model.peft_config["default"].selection = {"checks": [[32, 0.5], [64, None], ["x", 1], [1], 7, [-1, 0.5], [9, 5.0]]}
    model.save_pretrained(tmp_path)
    assert saved_adapter(str(tmp_path)).checks == [(32, 0.5), (64, None)]


def test_what_auto_saw_survives_in_the_adapters_config(tmp_path):
    model = adapted(llama())
    select_parameters(model, MANY[:5], progress=False)
    model.save_pretrained(tmp_path)
    config = FGGMConfig.from_pretrained(str(tmp_path))
    assert config.selection == model.peft_config["default"].selection
    assert len(torch.cat([layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()]))
