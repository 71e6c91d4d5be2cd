"""What ranks the units: every criterion of the registry, for every granularity."""

from __future__ import annotations

import pytest
import torch
from reference import seeded, unit_scores, units

from fggm_peft.core.criteria import CRITERIA, Quantities
from fggm_peft.core.granularity import GRANULARITIES

SHAPE = (6, 9)


def quantities(granularity, weight=None, seed=0, **more):
    def no_weight():
        raise AssertionError("this criterion does not look at the weight")

    source = no_weight if weight is None else lambda: weight
    return Quantities(GRANULARITIES[granularity], SHAPE, source, seeded(seed), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CRITERIA))
def test_a_criterion_gives_every_unit_a_finite_score_that_is_not_negative(name, granularity, dtype):
    weight = torch.randn(SHAPE).to(dtype)
    data = {"fisher": torch.rand(units(granularity, SHAPE))} if CRITERIA[name].needs_data else {}
    scores = CRITERIA[name].score(quantities(granularity, weight, **data))
    assert scores.shape == (units(granularity, SHAPE),)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("name", [name for name in CRITERIA if not CRITERIA[name].needs_data])
def test_a_data_free_criterion_gives_the_same_scores_for_the_same_seed_and_leaves_the_global_rng_alone(
    name, granularity
):
    weight = torch.randn(SHAPE)
    state = torch.get_rng_state()
    first, second = (CRITERIA[name].score(quantities(granularity, weight, seed=3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_fisher_is_the_fisher_information_and_does_not_read_the_weight(granularity):
    fisher = torch.rand(units(granularity, SHAPE))
    assert torch.equal(CRITERIA["fisher"].score(quantities(granularity, fisher=fisher)), fisher)


def test_random_scores_differ_by_seed_and_are_never_zero(granularity):
    scores = [CRITERIA["random"].score(quantities(granularity, seed=seed)) for seed in (0, 1)]
    assert not torch.equal(*scores)
    assert all((s > 0).all() and (s <= 1).all() for s in scores)


def test_a_random_unit_whose_draw_is_zero_may_still_be_chosen(granularity, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.zeros(count))
    assert (CRITERIA["random"].score(quantities(granularity)) > 0).all()


def test_weight_magnitude_is_the_l1_norm_of_a_unit(granularity):
    weight = torch.randn(SHAPE, dtype=torch.float64)
    scores = CRITERIA["weight_magnitude"].score(quantities(granularity, weight))
    torch.testing.assert_close(scores.double(), unit_scores(granularity, weight.abs()), rtol=1e-6, atol=0)


def test_only_fisher_like_criteria_need_data():
    assert {name: CRITERIA[name].needs_data for name in ("fisher", "random", "weight_magnitude")} == {
        "fisher": True,
        "random": False,
        "weight_magnitude": False,
    }


def test_an_unknown_criterion_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown criterion 'fischer'.*Did you mean 'fisher'"):
        CRITERIA["fischer"]
