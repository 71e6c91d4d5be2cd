"""Squared per-sample gradients against a float64 loop over single samples and positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import KINDS, per_sample_gradients, per_sample_weight_gradients, relative_error, unit_scores
from torch import nn

from fggm_peft.core import per_sample
from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.per_sample import (
    EmbeddingGradients,
    GramMatrix,
    GroupedGradients,
    LinearGradients,
    gram_is_cheaper,
    unfold_convolution,
)

FLOAT32 = 2e-6  # scores are float32 sums
HALF = torch.tensor([0, 1, 1, 0, 1])


def halves(gradients, granularity, units, half=HALF):
    scores = torch.zeros(2, units)
    granularity_from(granularity).accumulate_(scores, gradients, half)
    return scores


def naive_halves(weight_gradients, granularity, half=HALF):
    """Scores from per-sample gradients ``[b, o, i]`` float64."""
    scores = unit_scores(granularity, weight_gradients.square())
    return torch.stack([scores[half == which].sum(0) for which in (0, 1)])


def units(granularity, o, i):
    return granularity_from(granularity).units((o, i))


# Linear ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [1, 2, 3, 40])
def test_linear_scores_agree_with_the_naive_loop_on_both_sides_of_the_switch(granularity, t, dtype):
    o, i = 6, 5  # t = 2 is the largest length with the Gram form: 2 * 11 < 30
    x, g = torch.randn(5, t, i).to(dtype), torch.randn(5, t, o).to(dtype)
    assert gram_is_cheaper(t, o, i) == (t <= 2)
    actual = halves(LinearGradients(x, g), granularity, units(granularity, o, i))
    expected = naive_halves(per_sample_gradients(x, g), granularity)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < FLOAT32


@pytest.mark.parametrize("t", [1, 4, 25])
def test_the_gram_form_and_the_direct_form_agree(t, monkeypatch):
    x, g = torch.randn(3, t, 7, dtype=torch.float64), torch.randn(3, t, 9, dtype=torch.float64)
    expected = per_sample_gradients(x, g).square()
    for use_gram in (True, False):
        monkeypatch.setattr(per_sample, "gram_is_cheaper", lambda *args, use_gram=use_gram: use_gram)
        gradients = LinearGradients(x, g)
        assert relative_error(gradients.row_scores(), expected.sum(2)) < 1e-12
        assert relative_error(gradients.column_scores(), expected.sum(1)) < 1e-12


@settings(max_examples=60, deadline=None)
@given(
    t=st.sampled_from([1, 2, 9, 127, 128, 131, 200]),
    spans=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
)
def test_row_scores_are_correct_for_any_zero_part_of_the_gradient(t, spans):
    x, g = torch.randn(len(spans), t, 5, dtype=torch.float64), torch.randn(len(spans), t, 3, dtype=torch.float64)
    for sample, (start, end) in enumerate(spans):  # an empty span makes the whole gradient zero
        g[sample, : round(start * t)] = 0
        g[sample, round(end * t) :] = 0
    scores = LinearGradients(x, g).row_scores()
    assert relative_error(scores, per_sample_gradients(x, g).square().sum(2)) < 1e-10
    assert scores.dtype == torch.float64


@given(t=st.integers(1, 5000), o=st.integers(1, 5000), i=st.integers(1, 5000), layers=st.sampled_from([1, 2, 4]))
@example(t=127, o=254, i=254, layers=1)
@example(t=128, o=160, i=160, layers=1)
@example(t=128, o=161, i=160, layers=1)
def test_the_gram_form_is_used_when_it_needs_fewer_multiplications(t, o, i, layers):
    # cost of one sample and layer: x @ x.mT (shared by all layers) and its product with g, against g.mT @ x; ten of the
    # sixteen blocks of the Gram matrix are computed
    square = 16 * t * t if t < 128 else 10 * t * t
    assert gram_is_cheaper(t, o, i, layers) == (square * i + layers * square * o < layers * 16 * t * o * i)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [1, 127, 128, 130])
def test_blocks_of_the_lower_triangle_give_the_full_quadratic_form(t, dtype):
    x, g = torch.randn(2, t, 7).to(dtype), torch.randn(2, t, 5).to(dtype)
    blocks = GramMatrix()(x)
    assert (len(blocks), blocks[0][0], blocks[-1][1]) == (4 if t >= 128 else 1, 0, t)
    assert all(products.shape == (2, end - start, end) for start, end, products in blocks)
    expected = per_sample_gradients(x, g).square().sum(2)
    error = relative_error(per_sample._quadratic_form(g, blocks), expected)
    assert error < (1e-12 if dtype == torch.float64 else FLOAT32)


@settings(max_examples=15, deadline=None)
@given(t=st.integers(120, 140), o=st.integers(1, 300), i=st.integers(1, 300))
def test_scores_agree_with_autograd_on_both_sides_of_every_switch(t, o, i):
    x, g = torch.randn(2, t, i, dtype=torch.float64), torch.randn(2, t, o, dtype=torch.float64)
    expected = (g.mT @ x).square()
    gradients = LinearGradients(x, g)
    assert relative_error(gradients.row_scores(), expected.sum(2)) < 1e-12
    assert relative_error(gradients.column_scores(), expected.sum(1)) < 1e-12


@pytest.mark.parametrize("size", [0, 8 * 5 * 4, 8 * 5 * 4 + 1, 8 * 5 * 7])
def test_the_chunk_size_does_not_change_the_scores(granularity, size, monkeypatch):
    monkeypatch.setattr(per_sample, "_CHUNK_BYTES", size)  # chunks of 3 (the number of positions), 4, 4 and all 7 rows
    monkeypatch.setattr(per_sample, "gram_is_cheaper", lambda *args: False)
    x, g = torch.randn(5, 3, 5, dtype=torch.float64), torch.randn(5, 3, 7, dtype=torch.float64)
    expected = naive_halves(per_sample_gradients(x, g), granularity)
    assert relative_error(halves(LinearGradients(x, g), granularity, units(granularity, 7, 5)), expected) < FLOAT32


@settings(max_examples=40, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), gap=st.booleans())
def test_positions_without_a_gradient_change_nothing(spans, gap):
    b, t, o, i = len(spans), 9, 4, 3
    x, g = torch.randn(b, t, i, dtype=torch.float64), torch.randn(b, t, o, dtype=torch.float64)
    for sample, (start, end) in enumerate(spans):
        g[sample, :start], g[sample, end:] = 0, -0.0
    g[:, :, 0] *= not gap  # a zero feature does not make a position zero
    half = torch.arange(b) % 2
    for name in KINDS:
        expected = naive_halves(per_sample_gradients(x, g), name, half)
        assert relative_error(halves(LinearGradients(x, g), name, units(name, o, i), half), expected) < FLOAT32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_are_not_excluded(value, granularity):
    x, g = torch.ones(2, 4, 3), torch.zeros(2, 4, 5)
    g[1, 2, 3] = value
    actual = halves(LinearGradients(x, g), granularity, units(granularity, 5, 3), torch.tensor([0, 1]))
    assert not torch.isfinite(actual[1]).all()


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 4), t=st.integers(1, 9), o=st.integers(1, 9), i=st.integers(1, 9))
def test_any_shape_agrees_with_the_naive_loop(b, t, o, i):
    x, g = torch.randn(b, t, i, dtype=torch.float64), torch.randn(b, t, o, dtype=torch.float64)
    half = torch.arange(b) % 2
    for name in KINDS:
        expected = naive_halves(per_sample_gradients(x, g), name, half)
        assert relative_error(halves(LinearGradients(x, g), name, units(name, o, i), half), expected) < FLOAT32


def test_squares_of_small_bf16_gradients_do_not_underflow():
    x, g = torch.randn(2, 3, 8).bfloat16(), (1e-12 * torch.randn(2, 3, 8)).bfloat16()
    expected = per_sample_gradients(x, g).square()
    gradients = LinearGradients(x, g)
    assert relative_error(gradients.row_scores(), expected.sum(2)) < FLOAT32
    assert relative_error(gradients.column_scores(), expected.sum(1)) < FLOAT32


def test_scores_are_added_in_place(granularity):
    x, g = torch.randn(5, 3, 4), torch.randn(5, 3, 6)
    once = halves(LinearGradients(x, g), granularity, units(granularity, 6, 4))
    twice = once.clone()
    granularity_from(granularity).accumulate_(twice, LinearGradients(x, g), HALF)
    torch.testing.assert_close(twice, 2 * once)


def test_layers_share_the_gram_matrix_of_their_input_until_all_are_done():
    x, other, gram = torch.randn(2, 3, 8), torch.randn(2, 3, 8), GramMatrix(shared_by=2)
    torch.testing.assert_close(gram(x)[0][2], x @ x.mT)
    assert gram(x) is gram(x)
    torch.testing.assert_close(gram(other)[0][2], other @ other.mT)
    gram.done()
    assert gram._last[0] is other
    gram.done()  # a layer may finish without using the Gram matrix
    assert gram._last is None


def test_a_shared_gram_matrix_gives_each_layer_its_own_scores():
    x, gram = torch.randn(2, 4, 8), GramMatrix(shared_by=2)
    for o in (9, 12):
        g = torch.randn(2, 4, o)
        scores = LinearGradients(x, g, gram).row_scores()
        assert relative_error(scores, per_sample_gradients(x, g).square().sum(2)) < FLOAT32
    assert gram._last[0] is x


# Convolutions ------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "1d stride, padding, dilation": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (4, 11)),
    "1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (4, 7)),
    "1d valid": (lambda: nn.Conv1d(4, 6, 2, padding="valid"), (4, 7)),
    "2d": (lambda: nn.Conv2d(2, 6, 3), (2, 6, 5)),
    "2d tuples": (lambda: nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 7, 6)),
    "2d same, even kernel": (lambda: nn.Conv2d(2, 6, (2, 4), padding="same", dilation=(1, 2)), (2, 5, 6)),
    "2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 4)),
    "2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, stride=2), (3, 7, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 3, 5, 2)),
    "3d groups": (lambda: nn.Conv3d(4, 4, 2, groups=4, dilation=(1, 2, 1)), (4, 3, 4, 3)),
} | {
    mode: (lambda mode=mode: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode=mode), (2, 5, 4))
    for mode in ("reflect", "replicate", "circular")
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
each_convolution = pytest.mark.parametrize(("build", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)


@each_convolution
def test_unfolded_patches_times_the_weight_give_the_convolution(build, size):
    layer, x = build().double(), torch.randn(2, *size, dtype=torch.float64)
    patches = unfold_convolution(layer, x)
    weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))  # [groups, o, i]
    y = torch.einsum("btqi,qoi->bqot", patches, weight).flatten(1, 2) + layer.bias[:, None]
    torch.testing.assert_close(y, layer(x).flatten(2))


@each_convolution
def test_convolution_scores_agree_with_autograd_per_sample(build, size, granularity):
    layer, x = build(), torch.randn(5, *size)
    g = torch.randn_like(layer(x))
    flat = g.flatten(2).mT
    patches = unfold_convolution(layer, x)
    expected = naive_halves(per_sample_weight_gradients(layer, x, g).flatten(2), granularity)
    o, i = layer.weight.flatten(1).shape
    grouped = GroupedGradients(patches, flat.unflatten(2, (layer.groups, -1)))
    assert relative_error(halves(grouped, granularity, units(granularity, o, i)), expected) < FLOAT32
    if layer.groups == 1:
        plain = LinearGradients(patches.squeeze(2), flat)
        assert relative_error(halves(plain, granularity, units(granularity, o, i)), expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_grouped_gradients_accept_every_dtype(granularity, dtype):
    x, g = torch.randn(5, 4, 3, 2).to(dtype), torch.randn(5, 4, 3, 5).to(dtype)
    expected = torch.cat([per_sample_gradients(x[:, :, q], g[:, :, q]) for q in range(3)], 1)
    actual = halves(GroupedGradients(x, g), granularity, units(granularity, 15, 2))
    assert relative_error(actual, naive_halves(expected, granularity)) < FLOAT32


# Embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_embedding_scores_sum_the_gradients_of_a_repeated_token_before_squaring(granularity, index_dtype, dtype):
    tokens = torch.tensor([[0, 3, 3, 3], [3, 0, 1, 0], [6, 6, 6, 6], [2, 1, 0, 3], [5, 5, 2, 2]], dtype=index_dtype)
    g = torch.randn(5, 4, 3).to(dtype)
    expected = per_sample_gradients(F.one_hot(tokens.long(), 7), g).mT  # an embedding table is [tokens, features]
    actual = halves(EmbeddingGradients(tokens, g, 7), granularity, units(granularity, 7, 3))
    assert actual.dtype == torch.float32
    assert relative_error(actual, naive_halves(expected, granularity)) < FLOAT32


def test_embedding_scores_agree_with_autograd_of_the_layer(granularity):
    layer, tokens = nn.Embedding(9, 4), torch.randint(0, 9, (5, 12))
    g = torch.randn(5, 12, 4)
    expected = naive_halves(per_sample_weight_gradients(layer, tokens, g), granularity)
    actual = halves(EmbeddingGradients(tokens, g, 9), granularity, units(granularity, 9, 4))
    assert relative_error(actual, expected) < FLOAT32


def test_opposite_gradients_of_one_token_in_one_sample_cancel():
    gradients = EmbeddingGradients(torch.tensor([[2, 2]]), torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]]), 4)
    assert not gradients.row_scores().any()
    assert not gradients.column_scores().any()
