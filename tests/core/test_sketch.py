"""Sketched row and column scores against exact scores: mean, variance and selected units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    Twice,
    adapted,
    class_batches,
    class_log_likelihood,
    fggm_layers,
    fisher_scores,
    gpt2,
    llama,
    token_batches,
    train,
)
from reference import per_sample_gradients, relative_error, unit_scores
from torch import nn

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.core.granularity import GRANULARITIES, granularity_from
from fggm_peft.core.per_sample import GramMatrix, LinearGradients
from fggm_peft.core.sketch import Sketch, SketchedGradients, sketch_is_cheaper
from fggm_peft.selection import data_pass
from fggm_peft.selection.agreement import split_half_agreement
from fggm_peft.selection.measure import unit_entries
from fggm_peft.tuner.support import Choice
from fggm_peft.tuner.target import find_targets

SIZES = {"o": 24, "i": 20, "t": 30}
with_units = pytest.mark.parametrize("granularity", ["row", "column"])


def inputs(dtype=torch.float32, b: int = 3):
    """Correlated inputs and gradients with unequal scores of rows and columns."""
    generator = torch.Generator().manual_seed(1)
    o, i, t = SIZES["o"], SIZES["i"], SIZES["t"]
    x = torch.randn(b, t, 4, generator=generator) @ torch.randn(4, i, generator=generator)
    g = torch.randn(b, t, o, generator=generator) * torch.linspace(0.1, 2, o)
    return x.to(dtype), g.to(dtype)


def sketched(x, g, granularity: str, seed: int = 0, size: int = 4, samples=None, gram=None, name="block.proj"):
    """``[b, units]``."""
    gradients = LinearGradients(x, g, gram)
    samples = range(len(x)) if samples is None else samples
    gradients = SketchedGradients(gradients, Sketch(size, seed), samples, name)
    return {"row": gradients.row_scores, "column": gradients.column_scores}[granularity]()


def exact(x, g, granularity: str):
    return unit_scores(granularity, per_sample_gradients(x, g).square())


# The estimate ------------------------------------------------------------------------------------


@with_units
def test_the_mean_over_seeds_is_the_exact_score_with_the_variance_of_random_signs(granularity):
    x, g = inputs()
    size, seeds = 4, 2000
    matrices = per_sample_gradients(x, g)
    expected = exact(x, g, granularity)
    # of |v S|^2 / r with signs S: Var = 2 / r * (|v|^4 - sum v^4)
    vectors = matrices if granularity == "row" else matrices.mT
    variance = 2 / size * (vectors.square().sum(2).square() - vectors.pow(4).sum(2))
    result = torch.stack([sketched(x, g, granularity, seed, size) for seed in range(seeds)]).double()
    deviations = (result.mean(0) - expected) / (variance / seeds).sqrt()
    # 72 (60) nearly normal numbers: one exceeds 4.5 with a probability of 1 in 2000
    assert deviations.abs().max() < 4.5
    # all samples of a pass share one table of signs, so the variance is tested over all seeds
    torch.testing.assert_close(result.var(0).mean(), variance.mean(), rtol=0.1, atol=0)


@with_units
def test_the_variance_is_inversely_proportional_to_the_number_of_projections(granularity):
    x, g = inputs()
    variances = {}
    for size in (2, 4, 8):
        result = torch.stack([sketched(x, g, granularity, seed, size) for seed in range(500)])
        variances[size] = float(result.double().var(0).mean())
    assert variances[2] / variances[4] == pytest.approx(2, rel=0.2)
    assert variances[2] / variances[8] == pytest.approx(4, rel=0.2)


@with_units
def test_errors_of_different_samples_are_not_correlated(granularity):
    """For eight copies of a sample, the mean estimate has an eighth of the variance of one estimate."""
    x, g = (tensor[:1].expand(8, -1, -1) for tensor in inputs())
    errors = torch.stack([sketched(x, g, granularity, seed) for seed in range(500)]).double()
    errors = errors - exact(x, g, granularity)
    assert float(errors.mean(1).var(0).mean() / errors.var(0).mean()) == pytest.approx(1 / 8, rel=0.15)


@with_units
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs_are_accumulated_in_float32(granularity, dtype):
    """The estimate from 16-bit inputs equals the estimate from the same numbers in float64, up to float32 precision."""
    x, g = inputs(dtype)
    result = sketched(x, g, granularity)
    assert result.dtype == torch.float32
    assert relative_error(result, sketched(x.double(), g.double(), granularity)) < 1e-6


@with_units
def test_squares_of_small_gradients_do_not_underflow(granularity):
    x, g = inputs(torch.bfloat16)
    small = (g.float() * 1e-12).bfloat16()
    expected = sketched(x.double(), small.double(), granularity)
    assert relative_error(sketched(x, small, granularity), expected) < 1e-6


# The switch to exact scores ----------------------------------------------------------------------


@given(
    t=st.integers(1, 5000),
    o=st.integers(1, 5000),
    i=st.integers(1, 5000),
    size=st.integers(1, 64),
    layers=st.sampled_from([1, 2, 4]),
)
def test_a_sketch_is_used_when_it_needs_fewer_multiplications(t, o, i, size, layers):
    gram = t * t * i + layers * t * t * o  # per sample, for all layers with this input
    direct = layers * t * o * i
    assert sketch_is_cheaper(t, o, i, size, layers) == (size * t * i + layers * size * t * o < min(gram, direct))


@with_units
@pytest.mark.parametrize("t", [16, 17])
def test_scores_are_exact_up_to_the_switch_and_estimated_beyond(granularity, t):
    x, g = torch.randn(2, t, 64), torch.randn(2, t, 80)
    error = relative_error(sketched(x, g, granularity, size=16), exact(x, g, granularity))
    assert error < 1e-5 if t == 16 else error > 1e-2


def test_narrow_weights_are_scored_exactly():
    x, g = torch.randn(2, 200, 12), torch.randn(2, 200, 12)
    assert relative_error(sketched(x, g, "row", size=16), exact(x, g, "row")) < 1e-5


# Random numbers ----------------------------------------------------------------------------------


@with_units
def test_scores_depend_only_on_seed_module_and_sample(granularity):
    x, g = inputs()
    once = sketched(x, g, granularity)
    assert torch.equal(once, sketched(x, g, granularity))
    for other in ({"seed": 1}, {"name": "other.proj"}, {"samples": range(3, 6)}):
        assert not torch.equal(once, sketched(x, g, granularity, **other))
    alone = torch.cat([sketched(x[b : b + 1], g[b : b + 1], granularity, samples=[b]) for b in range(3)])
    torch.testing.assert_close(once, alone, rtol=1e-5, atol=0)


def test_torchs_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    sketched(*inputs(), "row")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_layers_share_the_projection_of_their_input(monkeypatch):
    x, g = inputs()
    sketch, gram = Sketch(4, 0), GramMatrix(shared_by=2)
    products = []
    original = Sketch._flips
    monkeypatch.setattr(Sketch, "_flips", lambda *args: products.append(args[1]) or original(*args))
    shared = [
        SketchedGradients(LinearGradients(x, g * factor, gram), sketch, range(3), f"attention.{name}").row_scores()
        for factor, name in ((1, "q"), (3, "k"))
    ]
    assert products == ["attention"]
    torch.testing.assert_close(shared[1], 9 * shared[0])
    SketchedGradients(LinearGradients(x.clone(), g, gram), sketch, range(3), "attention.v").row_scores()
    SketchedGradients(LinearGradients(x, g, gram), sketch, range(3), "mlp.up").row_scores()
    assert products == ["attention", "attention", "mlp"]
    sketch.forget()
    assert sketch._last is None


# The pass ----------------------------------------------------------------------------------------

SKETCH = {"fisher_estimate": "sketch"}


@pytest.fixture(autouse=True)
def few_projections(monkeypatch):
    monkeypatch.setattr(data_pass, "SKETCH_SIZE", 4)


def mean_scores(build, batches, granularity, seeds=40, log_likelihood=None, **config):
    runs = [
        fisher_scores(adapted(build(), granularity, seed=seed, **SKETCH, **config), batches, log_likelihood)
        for seed in range(seeds)
    ]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def assert_unbiased(found, expected, sketched_names=None):
    """Check that the mean of each module is within its standard error, which is positive for the sketched modules."""
    for name, scores in found.items():
        scores = scores.double()
        is_sketched = bool((scores.var(0) > 0).any())
        if sketched_names is not None:
            assert is_sketched == (name in sketched_names), name
        if not is_sketched:
            torch.testing.assert_close(scores[0], expected[name].double(), rtol=1e-4, atol=1e-9)
            continue
        deviation = (scores.sum(1).mean() - expected[name].double().sum()) / (scores.sum(1).var() / len(scores)).sqrt()
        assert abs(deviation) < 4, (name, deviation)


@with_units
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_pass_is_unbiased_with_padding_and_left_padded_nan(granularity, padding):
    batches = token_batches(padding=padding, length=12)
    expected = fisher_scores(adapted(llama(layers=1), granularity), batches)
    result = mean_scores(lambda: llama(layers=1), batches, granularity)
    assert_unbiased(result, expected, sketched_names=set(expected))


@with_units
def test_conv1d_is_sketched_and_embeddings_are_exact(granularity):
    targets = {"target_modules": ["c_attn", "c_fc", "wte"]}
    batches = token_batches(padding="right", length=12)
    expected = fisher_scores(adapted(gpt2(), granularity, **targets), batches)
    result = mean_scores(gpt2, batches, granularity, seeds=20, **targets)
    assert_unbiased(result, expected, sketched_names={name for name in expected if not name.endswith("wte")})


class Convolutions(nn.Module):
    """A plain and a grouped convolution over images made from tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.plain = nn.Conv1d(8, 12, 3, padding=1)
        self.grouped = nn.Conv1d(12, 4, 3, groups=4)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids).mT
        return self.grouped(torch.tanh(self.plain(hidden))).mean(2)


@with_units
def test_convolutions_are_sketched_and_grouped_convolutions_are_exact(granularity):
    targets = {"target_modules": ["plain", "grouped"]}
    batches = class_batches()
    expected = fisher_scores(adapted(Convolutions(), granularity, **targets), batches, class_log_likelihood)
    result = mean_scores(Convolutions, batches, granularity, log_likelihood=class_log_likelihood, **targets)
    assert_unbiased(result, expected, sketched_names={"plain"})


@with_units
def test_a_layer_called_twice_is_sketched_as_one_layer(granularity, monkeypatch):
    targets = {"target_modules": ["shared"]}
    batches = class_batches()
    # 4 projections do not need fewer operations than the full gradient of 8 x 8
    monkeypatch.setattr(data_pass, "SKETCH_SIZE", 2)
    config = {**targets, **SKETCH}
    expected = fisher_scores(adapted(Twice(), granularity, **targets), batches, class_log_likelihood)
    runs = [
        fisher_scores(adapted(Twice(), granularity, seed=seed, **config), batches, class_log_likelihood)["shared"]
        for seed in range(60)
    ]
    assert_unbiased({"shared": torch.stack(runs)}, expected, sketched_names={"shared"})


def support(granularity="row", batches=None, checkpointing=None, **config):
    model = adapted(llama(), granularity, **{**SKETCH, **config})
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    select_parameters(model, batches or token_batches(length=14), progress=False)
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@with_units
def test_the_seed_determines_the_support(granularity):
    assert_same(support(granularity), support(granularity))
    other = support(granularity, seed=1)
    assert any(not torch.equal(indices, other[name]) for name, indices in support(granularity).items())


def test_the_support_does_not_depend_on_batches_or_other_modules():
    whole = token_batches(sizes=(8,), length=14)[0]
    batches = [
        [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 8, size)] for size in (1, 4)
    ]
    assert_same(support(batches=batches[0]), support(batches=batches[1]))
    few = support(target_modules=["k_proj", "up_proj"])
    everything = support()
    assert_same(few, {name: everything[name] for name in few})


@with_units
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_and_groups_of_modules_do_not_change_the_support(granularity, use_reentrant):
    plain = support(granularity)
    assert_same(plain, support(granularity, checkpointing=use_reentrant))
    bytes_of_one = 2 * 4 * 96
    assert_same(plain, support(granularity, score_memory=bytes_of_one))


def test_labels_of_the_model_and_a_reference_are_sketched_too():
    model_labels = support(fisher_labels="model")
    assert_same(model_labels, support(fisher_labels="model"))
    exact_labels = support(fisher_labels="model", fisher_estimate="exact")
    assert any(not torch.equal(indices, exact_labels[name]) for name, indices in model_labels.items())
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1, length=14)]
    drawn = []
    for seed in (0, 0, 1):
        model = adapted(llama(), "column", criterion="gain_per_harm", seed=seed, **SKETCH)
        report = select_parameters(model, token_batches(length=14), reference=text, progress=False)
        assert report.reference_samples == 8
        drawn.append({name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()})
    assert_same(drawn[0], drawn[1])
    assert any(not torch.equal(indices, drawn[2][name]) for name, indices in drawn[0].items())


def test_the_pass_does_not_change_the_random_state():
    model = adapted(llama(), **SKETCH)
    state = torch.random.get_rng_state()
    select_parameters(model, token_batches(length=14), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


# Quality -----------------------------------------------------------------------------------------


def choices(model, batches) -> dict[str, Choice]:
    select_parameters(model, batches, num_samples=None, progress=False)
    return {
        name: Choice(layer.fggm_indices["default"].long(), layer.granularity["default"].units(layer.weight_shape), 1.0)
        for name, layer in fggm_layers(model, "default").items()
    }


def trained_llama():
    model = llama()
    model.requires_grad_(True)
    train(model, token_batches(sizes=(16, 16), length=24, padding="right"), steps=12, lr=3e-3)
    return model


@with_units
def test_a_sketch_agrees_with_the_exact_support_better_than_other_data(granularity):
    state = trained_llama().state_dict()

    def choose(batches, **config):
        model = llama()
        model.load_state_dict(state)
        return choices(adapted(model, granularity, density=0.3, **config), batches)

    data = token_batches(sizes=(8,) * 12, length=24, padding="right", seed=3)
    weights = unit_entries(find_targets(adapted(llama(), granularity), "default"))
    whole = choose(data)
    of_sketch, _ = split_half_agreement(whole, choose(data, fisher_estimate="sketch"), weights)
    of_data, _ = split_half_agreement(choose(data[:6]), choose(data[6:]), weights)
    assert of_sketch > of_data + 0.1


# Configuration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "element"}, "granularity='element'; use fisher_estimate='exact'"),
        ({"criterion": "random"}, "criterion 'random' uses none"),
        ({"criterion": "input_ratio", "granularity": "column"}, "criterion 'input_ratio' uses none"),
        ({"fisher_estimate": "rough"}, "fisher_estimate must be one of 'exact', 'sketch', got 'rough'"),
    ],
)
def test_the_config_rejects_settings_without_a_sketch(arguments, message):
    with pytest.raises(ValueError, match=message):
        FGGMConfig(**{"fisher_estimate": "sketch", **arguments})


def test_every_granularity_supports_or_rejects_a_sketch():
    for name in GRANULARITIES:
        if name == "element":
            continue
        assert sketched(*inputs(), name).shape[1] == granularity_from(name).units((SIZES["o"], SIZES["i"]))
