"""Blocks of rows and columns: every operation equals that of the slices in the blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapted, llama, logits, token_batches, train
from peft import PeftModel, get_peft_model
from reference import dense_delta, seeded

from fggm_peft import ColumnBlocks, FGGMConfig, NofM, RowBlocks, ScoreMass, input_covariance, select_parameters
from fggm_peft.core.covariance import Covariance
from fggm_peft.core.granularity import Columns, Elements, Granularity, Rows, granularity_from
from fggm_peft.core.per_sample import LinearGradients
from fggm_peft.deltas import export_lora
from fggm_peft.retention import HarmDecay
from fggm_peft.tuner.target import find_targets

BLOCKS = {"row": RowBlocks, "column": ColumnBlocks}
each_kind = pytest.mark.parametrize("name", BLOCKS)


def slices_of(indices: torch.Tensor, size: int) -> torch.Tensor:
    return torch.tensor([index * size + position for index in indices.tolist() for position in range(size)])


@st.composite
def examples(draw):
    """A granularity of blocks, that of its slices, a shape, indices of blocks, and random values."""
    name, size = draw(st.sampled_from(list(BLOCKS))), draw(st.integers(1, 3))
    shape = (size * draw(st.integers(1, 4)), size * draw(st.integers(1, 4)))
    blocks = BLOCKS[name](size)
    k = draw(st.integers(0, blocks.units(shape)))
    generator = seeded(draw(st.integers(0, 99)))
    indices = torch.randperm(blocks.units(shape), generator=generator)[:k].sort().values.to(torch.int32)
    values = torch.randn(blocks.values_shape(shape, k), generator=generator, dtype=torch.float64)
    return name, blocks, shape, indices, values


@settings(max_examples=100, deadline=None)
@given(example=examples())
def test_every_operation_agrees_with_the_dense_delta(example):
    name, blocks, shape, indices, values = example
    dense = dense_delta(name, shape, slices_of(indices, blocks.size), values)
    x, g = torch.randn(4, shape[1], dtype=torch.float64), torch.randn(4, shape[0], dtype=torch.float64)
    y, gx = torch.randn_like(g), torch.randn_like(x)
    expected_y, expected_gx = y + 0.5 * x @ dense.T, gx + 0.5 * g @ dense
    blocks.add_product_(y, x, indices, values, 0.5)
    blocks.add_input_gradient_(gx, g, indices, values, 0.5)
    torch.testing.assert_close((y, gx), (expected_y, expected_gx))
    gradient = blocks.value_gradient(blocks.stored_input(x, indices), g, indices)
    torch.testing.assert_close(gradient, blocks.gather(g.T @ x, indices))
    assert torch.equal(blocks.gather(dense, indices), values)
    weight = torch.randn(shape, dtype=torch.float64)
    changed = weight.clone()
    blocks.add_(changed, indices, values)
    torch.testing.assert_close(changed, weight + dense)
    rows = torch.randint(0, shape[0], (5,))
    assert torch.equal(blocks.delta_rows(rows, indices, values, shape), dense[rows])
    flat, entries = blocks.as_elements(indices, values, shape)
    assert flat.tolist() == sorted(flat.tolist())
    assert torch.equal(dense.flatten()[flat], entries)
    assert blocks.parameters_per_unit(shape) * len(indices) == values.numel()


@settings(max_examples=30, deadline=None)
@given(example=examples())
def test_scores_are_sums_over_the_entries_of_a_block(example):
    _, blocks, shape, *_ = example
    x, g, half = torch.randn(3, 4, shape[1]), torch.randn(3, 4, shape[0]), torch.tensor([0, 1, 0])
    scores = torch.ones(2, blocks.units(shape))
    blocks.accumulate_(scores, LinearGradients(x, g), half)
    squares = (g.double().mT @ x.double()).square()
    expected = torch.stack([blocks.reduce(squares[half == row].sum(0)) for row in (0, 1)])
    torch.testing.assert_close(scores.double(), 1 + expected, rtol=1e-5, atol=1e-6)
    entries = torch.arange(shape[0] * shape[1]).view(shape)
    sums = [int(blocks.gather(entries, torch.tensor([unit])).sum()) for unit in range(blocks.units(shape))]
    assert blocks.reduce(entries).tolist() == sums


@each_kind
def test_harm_decay_and_harm_are_those_of_the_slices(name):
    blocks, slices, shape = BLOCKS[name](2), granularity_from(name), (6, 8)
    indices = torch.tensor([0, 2])
    covariance = Covariance(torch.randn(8, 3), 0.1)
    values = torch.randn(blocks.values_shape(shape, 2))
    flat = values.reshape(slices.values_shape(shape, 4))
    ours = blocks.decay(covariance, indices, shape)
    theirs = slices.decay(covariance, slices_of(indices, 2), shape)
    assert ours.shrunk(values, 0.7).shape == values.shape
    torch.testing.assert_close(ours.shrunk(values, 0.7).reshape(flat.shape), theirs.shrunk(flat, 0.7))
    torch.testing.assert_close(ours.harm(values), theirs.harm(flat))


@each_kind
def test_an_adapter_of_blocks_trains_saves_loads_merges_and_exports(name, tmp_path):
    batches, kind = token_batches(), BLOCKS[name](4)
    model = adapted(llama(), kind, density=0.25, harm_decay=1.0)
    report = select_parameters(model, batches, reference=[token_batches(seed=1)], progress=False)
    assert f"{name}_block(size=4)" in str(report.granularity) and report.density == pytest.approx(0.25, abs=0.03)
    decay = HarmDecay(input_covariance(llama(), batches, progress=False), 1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    decay.attach(model, optimizer).remove()
    train(model, batches)
    expected = logits(model, batches[0])
    assert not torch.allclose(expected, logits(llama(), batches[0]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batches[0]), expected)
    target = next(iter(find_targets(loaded, "default").values()))
    assert target.granularity == kind and loaded.peft_config["default"].granularity == kind
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batches[0]), expected)
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=llama())
    exported = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(exported, batches[0]), expected, rtol=1e-4, atol=1e-5)


@each_kind
def test_a_shape_that_does_not_divide_is_refused_with_the_name_of_the_module(name):
    config = FGGMConfig(granularity=BLOCKS[name](7), target_modules=["q_proj"])
    with pytest.raises(ValueError, match=rf"q_proj: granularity='{name}_block\(size=7\)' does not support"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
@each_kind
def test_a_size_is_a_positive_integer(name, size):
    with pytest.raises(ValueError, match=r"Blocks\.size must be an integer > 0"):
        BLOCKS[name](size)


def test_blocks_of_one_are_slices():
    shape, indices = (4, 6), torch.tensor([1, 3])
    for blocks, slices in ((RowBlocks(1), Rows()), (ColumnBlocks(1), Columns())):
        assert isinstance(blocks, Granularity) and blocks.units(shape) == slices.units(shape)
        assert torch.equal(blocks.element_indices(indices, shape), slices.element_indices(indices, shape))


# N of M --------------------------------------------------------------------------------------------


@given(data=st.data(), n=st.integers(1, 3), m=st.integers(2, 5))
def test_only_the_best_n_of_m_can_be_selected(data, n, m):
    if n >= m:
        return
    scores = data.draw(st.lists(st.integers(0, 4), min_size=3 * m, max_size=3 * m))
    expected = [0.0] * len(scores)
    for start in range(0, len(scores), m):
        for index in sorted(range(start, start + m), key=lambda i: (-scores[i], i))[:n]:
            expected[index] = float(scores[index])
    assert NofM(n, m).selectable(torch.tensor(scores, dtype=torch.float32)).tolist() == expected


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_an_adapter_has_at_most_n_of_m_elements_of_a_row(density, tmp_path):
    batches = token_batches()
    model = adapted(llama(), NofM(2, 4), density=density)
    report = select_parameters(model, batches, progress=False)
    assert report.density == pytest.approx(density, abs=1e-3) and 0 <= report.regret < 0.25
    for target in find_targets(model, "default").values():
        counts = torch.zeros(target.shape).flatten().index_fill(0, target.indices.long(), 1).view(-1, 4).sum(1)
        assert counts.max() <= 2 and (density < 0.5 or counts.min() == 2)
    train(model, batches)
    expected = logits(model, batches[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(loaded, batches[0]), expected)
    assert loaded.peft_config["default"].granularity == NofM(2, 4) == granularity_from({"granularity": "n_of_m"})
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batches[0]), expected)


def test_thresholds_that_n_of_m_cannot_meet_are_rejected_with_the_name_of_the_module():
    with pytest.raises(
        ValueError, match=r"q_proj: the threshold selects 2458 values, but .*n_of_m\(n=2, m=4\)' allows 2048"
    ):
        adapted(llama(), NofM(2, 4), density=0.6, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj: granularity='n_of_m\(n=2, m=5\)' does not support a weight"):
        adapted(llama(), NofM(2, 5), target_modules=["q_proj"])
    model = adapted(llama(), NofM(1, 4), threshold=ScoreMass(1.0))  # selects what is possible
    assert select_parameters(model, token_batches(), progress=False).density == pytest.approx(0.25, abs=1e-3)
    for n, m in ((0, 4), (4, 4), (2.0, 4), (True, 4)):
        with pytest.raises(ValueError, match="NofM requires integers 0 < n < m"):
            NofM(n, m)
    assert isinstance(NofM(), Elements)
