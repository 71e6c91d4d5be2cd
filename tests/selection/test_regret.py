"""The regret of a selection against its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapted, llama, token_batches
from peft import get_peft_model

from fggm_peft import FGGMConfig, ScoreMass, TopDensity, select_parameters
from fggm_peft.selection.regret import regret_of, split_half_scores
from fggm_peft.tuner.target import find_targets

PATHS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qk"]  # weights of two shapes


def drawn_scores(seed: int, targets) -> dict[tuple[str, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {(p, half): torch.rand(t.units, generator=generator) for p, t in targets.items() for half in (0, 1)}


def adapter(threshold) -> tuple[FGGMConfig, dict]:
    names = [path.removeprefix("model.") for path in PATHS]
    model = get_peft_model(llama(), FGGMConfig(threshold=threshold, target_modules=names, granularity="column"))
    return model.peft_config["default"], find_targets(model, "default")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.sampled_from([TopDensity(0.25), ScoreMass(0.5)]))
def test_each_half_is_compared_with_the_best_selection_of_the_same_size(seed, threshold):
    config, targets = adapter(threshold)
    scores = drawn_scores(seed, targets)
    pairs = split_half_scores(targets, config, lambda path, half: scores[path, half])
    for path in targets:
        selected = best = 0.0
        for half in (0, 1):
            own, other = scores[path, half].double(), scores[path, 1 - half].double()
            size = round(0.25 * len(own)) if isinstance(threshold, TopDensity) else None
            if size is None:
                sums = own.sort(descending=True).values.cumsum(0)
                size = int((sums < 0.5 * own.sum() * (1 - 1e-9)).sum()) + 1
            selected += float(other[own.argsort(descending=True)[:size]].sum())
            best += float(other.sort(descending=True).values[:size].sum())
        assert pairs[path] == pytest.approx((selected, best))
    total = [sum(column) for column in zip(*pairs.values(), strict=True)]
    assert regret_of(pairs.values()) == pytest.approx((1 - total[0] / total[1]) / 4)


def test_with_global_scope_the_best_selection_is_over_all_weights():
    config, targets = adapter(TopDensity(0.02, scope="global"))
    scores = {key: torch.zeros(targets[key[0]].units) for key in itertools.product(targets, (0, 1))}
    first, *_, last = targets
    for path in targets:
        for half in (0, 1):
            scores[path, half][:] = 0.1
    scores[first, 0][:4], scores[last, 1][:4] = 9.0, 8.0  # each half prefers another weight
    selected, best = zip(*split_half_scores(targets, config, lambda *key: scores[key]).values(), strict=True)
    assert sum(selected) < 0.1 * sum(best)


@pytest.mark.parametrize("density", [0.05, 0.25])
@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_the_regret_is_that_of_the_selection_from_all_samples(density, noise):
    """Scores are a mean over samples with known expectation, so the true regret is known."""
    config, targets = adapter(TopDensity(density))
    generator, estimates, true = torch.Generator().manual_seed(0), [], []
    for _ in range(40):
        means = {path: torch.randn(target.units, generator=generator).exp() for path, target in targets.items()}
        halves = {
            (path, half): mean * (1 + noise * torch.randn(len(mean), generator=generator)).clamp(min=0)
            for path, mean in means.items()
            for half in (0, 1)
        }
        pairs = split_half_scores(targets, config, lambda *key, halves=halves: halves[key])
        estimates.append(regret_of(pairs.values()))
        sizes = {path: round(density * len(mean)) for path, mean in means.items()}
        chosen = {path: (halves[path, 0] + halves[path, 1]).argsort(descending=True)[: sizes[path]] for path in means}
        best = sum(float(mean.sort(descending=True).values[: sizes[path]].sum()) for path, mean in means.items())
        true.append(1 - sum(float(mean[chosen[path]].sum()) for path, mean in means.items()) / best)
    assert 0.5 < sum(estimates) / sum(true) < 2


@pytest.mark.parametrize(("density", "other_half"), [(0.25, 0), (1.0, 1)])
def test_equal_halves_and_a_selection_of_everything_have_no_regret(density, other_half):
    config, targets = adapter(TopDensity(density))
    scores = drawn_scores(0, targets)
    pairs = split_half_scores(targets, config, lambda path, half: scores[path, half * other_half])
    assert regret_of(pairs.values()) == pytest.approx(0, abs=1e-9)


def test_scores_of_zero_have_no_regret():
    config, targets = adapter(TopDensity(0.25))
    zeros = split_half_scores(targets, config, lambda path, half: torch.zeros(targets[path].units))
    assert regret_of(zeros.values()) is None


@pytest.mark.parametrize("regret", [0, 1, -0.1, float("nan"), "2%", True])
def test_an_illegal_regret_is_refused(regret):
    with pytest.raises(ValueError, match=r"regret must be (a number in \(0, 1\)|of type float)"):
        FGGMConfig(regret=regret)


def test_the_report_has_the_regret_of_each_module():
    report = select_parameters(adapted(llama()), token_batches(), progress=False)
    assert 0 < report.regret < 1 and all(0 <= module.regret <= 1 for module in report.modules)
    assert f"regret {report.regret:.1%}" in str(report)
