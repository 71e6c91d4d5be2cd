"""``select_parameters``: the support, the report and errors."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from models import (
    Twice,
    adapted,
    class_batches,
    class_log_likelihood,
    fggm_layers,
    fisher_scores,
    llama,
    logits,
    token_batches,
    trace,
    train,
)
from torch import nn

from fggm_peft import (
    AdapterNotSelectedError,
    AlreadyTrainedError,
    FGGMConfig,
    FGGMLayer,
    NonFiniteScoreError,
    ParameterBudget,
    ScoreMass,
    ThresholdPolicy,
    TopDensity,
    select_parameters,
)
from fggm_peft.selection.likelihood import default_log_likelihood


def test_the_support_contains_the_highest_scores(granularity):
    model = adapted(llama(), granularity, density=0.25)
    report = select_parameters(model, token_batches(), num_samples=None, progress=False)
    scores = fisher_scores(model, token_batches())
    for module in report.modules:
        indices = fggm_layers(model, "default")[module.name].fggm_indices["default"].long()
        assert len(indices) == module.chosen == round(0.25 * module.units)
        rest = torch.ones(module.units, dtype=torch.bool)
        rest[indices] = False
        assert scores[module.name][indices].min() >= scores[module.name][rest].max()
        share = scores[module.name][indices].sum() / scores[module.name].sum()
        assert module.score_share == pytest.approx(float(share), rel=1e-4)


def test_the_batch_size_does_not_change_the_support(granularity):
    supports = []
    for size in (1, 4):
        whole = token_batches(sizes=(8,))[0]
        batches = [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 8, size)]
        model = adapted(llama(), granularity)
        select_parameters(model, batches, num_samples=6, progress=False)
        supports.append([layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()])
    assert all(torch.equal(a, b) for a, b in zip(*supports, strict=True))


def shuffling(batches, fail_at=None):
    for number, batch in enumerate(batches):
        random.random(), np.random.rand(), torch.rand(1)
        if number == fail_at:
            raise OSError("the worker died")
        yield batch


@pytest.mark.parametrize("fail_at", [None, 2])
def test_the_pass_does_not_change_model_and_random_state(fail_at):
    model = adapted(llama(), modules_to_save=["lm_head"])
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = trace(model)
    output = logits(model, token_batches()[0])
    model.train()
    model.base_model.model.model.layers[0].eval()
    if fail_at is None:
        select_parameters(model, shuffling(token_batches()), progress=False)
    else:
        with pytest.raises(OSError, match="worker died"):
            select_parameters(model, shuffling(token_batches(), fail_at), progress=False)
        assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())
    after = trace(model)
    assert before[0] == after[0] and before[2:] == after[2:]
    assert all(gradient is None for _, gradient in after[1])
    assert torch.equal(logits(model, token_batches()[0]), output)


def test_the_automatic_number_of_samples_stops_when_the_regret_is_small():
    """Repeated samples have none at the first check; other samples use all data."""
    model = adapted(llama())
    repeated = [token_batches(sizes=(4,))[0]] * 64
    one = {key: value[:1].expand(8, -1) for key, value in repeated[0].items()}
    report = select_parameters(model, [one] * 64, progress=False)
    assert report.samples == 8 and report.regret == pytest.approx(0, abs=1e-6)
    noise = select_parameters(adapted(llama()), token_batches(sizes=(8,) * 6), progress=False)
    assert noise.samples == 48 and noise.regret > 0.02  # the data ran out first
    assert model.peft_config["default"].selection["samples"] == 8
    easy = adapted(llama(), regret=0.5)
    assert select_parameters(easy, token_batches(sizes=(8,) * 6), progress=False).samples == 8


def test_too_large_num_samples_warns_and_uses_all_samples():
    with pytest.warns(UserWarning, match=r"num_samples=100.*has 8"):
        assert select_parameters(adapted(llama()), token_batches(), num_samples=100, progress=False).samples == 8


@pytest.mark.parametrize("config", [{}, {"threshold": ScoreMass(0.8)}])
def test_limited_score_memory_does_not_change_the_support(config):
    def support(**memory):
        model = adapted(llama(), "element", **config, **memory)
        select_parameters(model, token_batches(), progress=False)
        return [layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()]

    # the largest weight is 96 x 64 and needs 8 bytes per entry
    assert all(torch.equal(a, b) for a, b in zip(support(), support(score_memory=96 * 64 * 8), strict=True))


def test_a_global_threshold_distributes_its_budget_over_the_model():
    model = adapted(llama(), threshold=ParameterBudget(10_000))
    report = select_parameters(model, token_batches(), progress=False)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert report.parameters == trainable and 10_000 - 96 < trainable <= 10_000
    assert len({module.density for module in report.modules}) > 3


def test_density_pattern_overrides_single_modules():
    config = {"density": 0.5, "density_pattern": {"q_proj": 0.25, r"layers\.1\.mlp\.up_proj": 0.125}}
    model = adapted(llama(), **config)
    for module in select_parameters(model, token_batches(), progress=False).modules:
        expected = 0.25 if "q_proj" in module.name else 0.125 if "1.mlp.up_proj" in module.name else 0.5
        assert module.density == expected


def test_the_report_converts_to_text_and_a_dict():
    report = select_parameters(adapted(llama()), token_batches(), progress=False)
    text = str(report)
    assert "model.layers.0.mlp.up_proj" in text and "8 samples" in text
    modules = report.to_dict()["modules"]
    assert len(modules) == 14 and sum(module["parameters"] for module in modules) == report.parameters
    assert report.to_dict()["regret"] == report.regret
    assert report.density == pytest.approx(0.3, abs=0.02)


def test_training_an_unselected_adapter_raises_an_error_that_names_select_parameters():
    model = adapted(llama())
    model.train()
    with pytest.raises(AdapterNotSelectedError, match="select_parameters"):
        model(**token_batches()[0])
    assert logits(model, token_batches()[0]).isfinite().all()


def test_selecting_again_after_training_requires_reset():
    batches = token_batches()
    model = adapted(llama())
    select_parameters(model, batches, progress=False)
    select_parameters(model, batches, progress=False)  # allowed, because nothing is trained yet
    train(model, batches)
    trained = logits(model, batches[0])
    with pytest.raises(AlreadyTrainedError, match="reset=True"):
        select_parameters(model, batches, progress=False)
    assert torch.equal(logits(model, batches[0]), trained)
    select_parameters(model, batches, reset=True, progress=False)
    torch.testing.assert_close(logits(model, batches[0]), logits(llama(), batches[0]))
    expected = fisher_scores(adapted(llama()), batches)  # scores do not depend on the old delta
    model = adapted(llama())
    select_parameters(model, batches, progress=False)
    train(model, batches)
    for name, score in fisher_scores(model, batches).items():
        torch.testing.assert_close(score, expected[name])


def no_labels():
    return [{"input_ids": batch["input_ids"]} for batch in token_batches()]


def ignored_labels():
    return [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in token_batches()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs data"),
        ([], "empty"),
        (no_labels(), "no labels"),
        (ignored_labels(), "-100"),
        ([(1, 2)], "must be dicts"),
    ],
)
def test_invalid_data_raises_an_error_and_does_not_change_the_model(data, message):
    model = adapted(llama())
    with pytest.raises(ValueError, match=message):
        select_parameters(model, data, progress=False)
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())


def test_a_sample_without_answer_has_zero_scores_in_every_batch():
    (batch,) = token_batches(sizes=(4,))
    batch["labels"][1] = -100
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    expected = fisher_scores(adapted(llama()), [batch])
    for name, score in fisher_scores(adapted(llama()), single).items():
        torch.testing.assert_close(score, expected[name])


@pytest.mark.parametrize("bad", [0, 1, -3, True, 2.5, "all"])
def test_an_invalid_number_of_samples_is_rejected(bad):
    with pytest.raises(ValueError, match="num_samples"):
        select_parameters(adapted(llama()), token_batches(), num_samples=bad)


def test_a_nan_in_the_pass_raises_an_error_that_names_module_and_batch():
    model = adapted(llama())
    batches = token_batches()

    def spoiled(model, batch):
        value = default_log_likelihood(model.get_base_model(), "CAUSAL_LM")(model, batch)
        return value * float("nan") if batch["input_ids"].shape == batches[1]["input_ids"].shape else value

    with pytest.raises(NonFiniteScoreError, match="batch 1"):
        select_parameters(model, batches, log_likelihood=spoiled, progress=False)

    def steep(model, batch):  # the likelihood is finite, but its squared gradients overflow
        return default_log_likelihood(model.get_base_model(), "CAUSAL_LM")(model, batch) * 1e25

    with pytest.raises(NonFiniteScoreError, match=r"module model\.layers\.\d.*batch 0"):
        select_parameters(model, batches, log_likelihood=steep, progress=False)
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())


def test_an_iterator_cannot_be_read_twice():
    with pytest.raises(ValueError, match="read once"):
        select_parameters(adapted(llama(), "element", score_memory=96 * 64 * 8), iter(token_batches()), progress=False)


def test_score_memory_must_fit_one_module_and_requires_layer_scope():
    model = adapted(llama(), "element", score_memory="1KB")
    with pytest.raises(ValueError, match="too small"):
        select_parameters(model, token_batches(), progress=False)
    model = adapted(llama(), "element", threshold=TopDensity(0.1, scope="global"), score_memory=96 * 64 * 8)
    with pytest.raises(ValueError, match="scope='layer'"):
        select_parameters(model, token_batches(), progress=False)


def test_models_without_an_adapter_or_with_a_merged_one_are_rejected():
    with pytest.raises(ValueError, match="get_peft_model"):
        select_parameters(llama(), token_batches())
    model = adapted(llama(), criterion="random")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        select_parameters(model, token_batches())


def test_data_free_criteria_select_at_creation_and_can_select_again():
    for criterion in ("random", "weight_magnitude"):
        model = adapted(llama(), criterion=criterion)
        before = [layer.fggm_indices["default"].clone() for layer in fggm_layers(model, "default").values()]
        assert all(len(indices) for indices in before)
        report = select_parameters(model)
        after = [layer.fggm_indices["default"] for layer in fggm_layers(model, "default").values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert report.samples == 0 and report.regret is None


def test_modules_without_gradients_stay_empty_and_are_reported():
    class WithIdle(Twice):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 8)

    model = adapted(WithIdle(), target_modules=["shared", "idle"])
    with pytest.warns(UserWarning, match="idle"):
        report = select_parameters(model, class_batches(), log_likelihood=class_log_likelihood, progress=False)
    assert [module.name for module in report.modules if not module.chosen] == ["idle"]
    model.train()
    assert model(class_batches()[0]["input_ids"]).requires_grad


def test_models_with_injected_layers_can_be_selected():
    model = llama()
    model.add_adapter(FGGMConfig(target_modules=["q_proj", "v_proj"]))
    report = select_parameters(model, token_batches(), progress=False)
    assert len(report.modules) == 4
    assert any(isinstance(module, FGGMLayer) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(**token_batches()[0]).loss.requires_grad


class Nothing(ThresholdPolicy):
    name = "nothing"

    def select(self, scores, costs):
        return [torch.empty(0, dtype=torch.int64) for _ in scores]


def test_a_threshold_that_selects_nothing_raises_an_error():
    with pytest.raises(ValueError, match="chooses nothing"):
        select_parameters(adapted(llama(), threshold=Nothing()), token_batches(), progress=False)


def test_an_unmatched_density_pattern_causes_a_warning():
    with pytest.warns(RuntimeWarning, match=r"density_pattern.*\['query'\]"):
        adapted(llama(), density_pattern={"query": 0.1, "q_proj": 0.2})


def test_selection_works_inside_inference_mode():
    model = adapted(llama())
    with torch.inference_mode():
        select_parameters(model, token_batches(), progress=False)
    assert train(model, token_batches())
