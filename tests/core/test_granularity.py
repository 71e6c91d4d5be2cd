"""Every method of every granularity agrees with the dense delta."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import KINDS, TOLERANCE, dense_delta, mask, relative_error, seeded, unit_scores, units

from fggm_peft.core.granularity import GRANULARITIES, Columns, Elements, Granularity, Rows, granularity_from
from fggm_peft.core.per_sample import LinearGradients
from fggm_peft.core.registry import Registry
from fggm_peft.core.weight_delta import WeightDelta

SHAPES = [(1, 1), (5, 7), (8, 3), (1, 9), (6, 1)]
INDEX_DTYPES = [torch.int32, torch.int64]


def counts(name, shape):
    """No unit, one unit, about half and all units."""
    total = units(name, shape)
    return sorted({0, 1, (total + 1) // 2, total})


def weights(shape, dtype=torch.float32):
    """The same matrix, contiguous and transposed as in a Conv1D."""
    weight = torch.randn(shape).to(dtype)
    return [weight, weight.T.contiguous().T]


@pytest.mark.parametrize("shape", SHAPES)
def test_units_times_parameters_per_unit_is_the_whole_weight(granularity, shape):
    kind = granularity_from(granularity)
    assert kind.name == granularity
    assert kind.units(shape) == units(granularity, shape)
    assert kind.units(shape) * kind.parameters_per_unit(shape) == shape[0] * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_contain_one_number_for_each_entry_of_the_support(granularity, shape, make_delta):
    kind = granularity_from(granularity)
    for k in counts(granularity, shape):
        delta = make_delta(granularity, shape, k)
        expected = kind.values_shape(shape, k)
        assert delta.values.numel() == int(mask(granularity, shape, delta.indices).sum())
        assert expected[kind.unit_dim] == k


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_sums_the_scores_of_the_entries_of_a_unit(granularity, shape):
    matrix = torch.rand(shape, dtype=torch.float64)
    for scores in (matrix, matrix.T.contiguous().T):
        torch.testing.assert_close(granularity_from(granularity).reduce(scores), unit_scores(granularity, matrix))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_reads_the_selected_entries_in_the_order_of_the_values(granularity, shape, index_dtype, make_delta):
    for weight in weights(shape):
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, index_dtype=index_dtype)
            entries = delta.granularity.gather(weight, delta.indices)
            assert entries.shape == delta.values.shape
            assert torch.equal(entries.flatten(), weight[mask(granularity, shape, delta.indices)])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_put_writes_only_the_selected_entries(granularity, shape, index_dtype, make_delta):
    for weight in weights(shape):
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, index_dtype=index_dtype)
            chosen = mask(granularity, shape, delta.indices)
            written = weight.clone()
            delta.granularity.put_(written, delta.indices, delta.values.detach())
            assert torch.equal(written[~chosen], weight[~chosen])
            assert torch.equal(written[chosen], delta.values.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adding_rounds_each_changed_entry_once_and_keeps_the_others(granularity, dtype, make_delta):
    shape = (9, 11)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for weight in weights(shape, dtype):
        delta = make_delta(granularity, shape, 4, scale=0.5)
        chosen = mask(granularity, shape, delta.indices)
        full = dense_delta(granularity, shape, delta.indices, delta.values.detach()).to(wide)
        once = (weight.to(wide) + 0.5 * full).to(dtype)
        added = delta.granularity.added(weight, delta.indices, delta.values.detach(), delta.scale)
        assert torch.equal(added.flatten(), once[chosen])
        changed = weight.clone()
        delta.granularity.add_(changed, delta.indices, delta.values.detach(), delta.scale)
        assert torch.equal(changed, torch.where(chosen, once, weight))


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_products_and_their_gradients_agree_with_the_dense_delta(granularity, index_dtype, make_delta):
    for shape in SHAPES:
        for k in counts(granularity, shape):
            delta = make_delta(granularity, shape, k, torch.float64, index_dtype=index_dtype)
            values = delta.values.detach()
            dense = dense_delta(granularity, shape, delta.indices, values)
            x, g = torch.randn(4, shape[1], dtype=torch.float64), torch.randn(4, shape[0], dtype=torch.float64)
            y, gx = torch.randn_like(g), torch.randn_like(x)
            expected_y, expected_gx = y - 0.5 * x @ dense.T, gx - 0.5 * g @ dense
            delta.granularity.add_product_(y, x, delta.indices, values, -0.5)
            delta.granularity.add_input_gradient_(gx, g, delta.indices, values, -0.5)
            gradient = delta.granularity.value_gradient(x, g, delta.indices)
            assert relative_error(y, expected_y) < TOLERANCE[torch.float64]
            assert relative_error(gx, expected_gx) < TOLERANCE[torch.float64]
            assert gradient.shape == values.shape
            chosen = (g.T @ x)[mask(granularity, shape, delta.indices)]
            assert relative_error(gradient.flatten(), chosen) < TOLERANCE[torch.float64]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(KINDS), shape=st.sampled_from(SHAPES))
def test_delta_rows_and_their_gradients_agree_with_the_dense_delta(data, name, shape, make_delta):
    k = data.draw(st.integers(0, units(name, shape)))
    index_dtype = data.draw(st.sampled_from(INDEX_DTYPES))
    tokens = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=8)), dtype=torch.int64)
    delta = make_delta(name, shape, k, torch.float64, seed=k, index_dtype=index_dtype)
    rows = delta.granularity.delta_rows(tokens, delta.indices, delta.values, shape)
    expected = dense_delta(name, shape, delta.indices, delta.values)[tokens]
    assert torch.equal(rows, expected)
    if rows.requires_grad:
        g = torch.randn_like(rows)
        (gradient,) = torch.autograd.grad(rows, delta.values, g)
        (wanted,) = torch.autograd.grad(expected, delta.values, g)
        torch.testing.assert_close(gradient, wanted)


def test_delta_rows_give_gradients_to_the_values_of_the_read_rows(granularity, make_delta):
    total = units(granularity, (5, 4))
    delta = make_delta(granularity, (5, 4), total)
    tokens = torch.tensor([2, 0, 2])
    delta.granularity.delta_rows(tokens, delta.indices, delta.values, (5, 4)).sum().backward()
    counted = dense_delta(granularity, (5, 4), delta.indices, delta.values.grad)
    assert torch.equal(counted, torch.tensor([1.0, 0, 2, 0, 0]).double()[:, None].expand(5, 4))


# The defaults of the base class -------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles(Granularity):
    """Square tiles; the entries of one tile are not adjacent in the flat weight. Values are ``[k, size, size]``."""

    name = "tiles"
    size: int = 2

    def supports(self, shape):
        return shape[0] % self.size == 0 and shape[1] % self.size == 0

    def units(self, shape):
        return shape[0] * shape[1] // self.size**2

    def parameters_per_unit(self, shape):
        return self.size**2

    def values_shape(self, shape, k):
        return (k, self.size, self.size)

    def element_indices(self, indices, shape):
        flat = torch.arange(shape[0] * shape[1], device=indices.device).view(1, 1, *shape).double()
        tiles = F.unfold(flat, self.size, stride=self.size)[0].long()  # [size * size, units]
        return tiles[:, indices.long()].T.flatten()

    def reduce(self, matrix):
        return F.unfold(matrix[None, None], self.size, stride=self.size)[0].sum(0)


@pytest.fixture
def tiles():
    """A support of tiles of a weight ``[6, 8]``, its values in float64 and the dense delta."""
    kind, shape, indices = Tiles(2), (6, 8), torch.tensor([1, 2, 7, 11], dtype=torch.int32)
    values = torch.randn(kind.values_shape(shape, 4), dtype=torch.float64, generator=seeded())
    dense = torch.zeros(48, dtype=torch.float64)
    dense[kind.element_indices(indices, shape)] = values.flatten()
    return kind, shape, indices, values, dense.view(shape)


def test_the_defaults_read_and_write_the_entries_of_the_units(tiles):
    kind, shape, indices, values, dense = tiles
    for weight in weights(shape, torch.float64):
        assert torch.equal(kind.gather(dense, indices), values)
        written = weight.clone()
        kind.put_(written, indices, values)
        assert torch.equal(written, torch.where(dense != 0, dense, weight))
        added = weight.clone()
        kind.add_(added, indices, values, 0.5)
        torch.testing.assert_close(added, weight + 0.5 * dense)


def test_the_default_products_and_gradients_agree_with_the_dense_delta(tiles):
    kind, shape, indices, values, dense = tiles
    x, g = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    y, gx = torch.zeros(5, 6, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    kind.add_product_(y, x, indices, values, 2.0)
    kind.add_input_gradient_(gx, g, indices, values, 2.0)
    torch.testing.assert_close(y, 2 * x @ dense.T)
    torch.testing.assert_close(gx, 2 * g @ dense)
    gradient = kind.value_gradient(kind.stored_input(x, indices), g, indices)
    torch.testing.assert_close(gradient, kind.gather(g.T @ x, indices))
    trained = values.clone().requires_grad_()
    rows = kind.delta_rows(torch.tensor([3, 0, 3]), indices, trained, shape)
    assert torch.equal(rows, dense[[3, 0, 3]])
    rows.sum().backward()
    counts = torch.tensor([1.0, 0, 0, 2, 0, 0]).double()[:, None].expand(shape)
    torch.testing.assert_close(trained.grad, kind.gather(counts, indices))
    elements = WeightDelta(kind, indices, values).as_elements(shape)
    assert elements.granularity == Elements() and elements.indices.tolist() == sorted(elements.indices.tolist())
    torch.testing.assert_close(elements.values, dense.flatten()[elements.indices.long()])


def test_the_default_scores_are_sums_over_the_entries_of_the_units(tiles):
    kind, shape, *_ = tiles
    x, g, half = torch.randn(3, 4, 8), torch.randn(3, 4, 6), torch.tensor([0, 1, 0])
    scores = torch.zeros(2, kind.units(shape))
    kind.accumulate_(scores, LinearGradients(x, g), half)
    squares = (g.mT @ x).square()
    expected = torch.stack([kind.reduce(squares[half == row].sum(0)) for row in (0, 1)])
    torch.testing.assert_close(scores, expected)


def test_a_granularity_is_a_value_that_converts_to_json_and_back():
    assert granularity_from("row") == Rows() == granularity_from(Rows()) == granularity_from(Rows().to_dict())
    assert Rows().to_dict() == str(Rows()) == "row"
    GRANULARITIES.register("tiles")(Tiles)
    try:
        stored = json.loads(json.dumps(Tiles(4).to_dict()))
        assert stored == {"granularity": "tiles", "size": 4} and str(Tiles(4)) == "tiles(size=4)"
        assert (Rows().plural, Tiles(4).plural) == ("rows", "tiles(size=4)")
        assert granularity_from(stored) == Tiles(4) != granularity_from("tiles")
        with pytest.raises(ValueError, match="Tiles has no argument 'sizes'; it takes size"):
            granularity_from({"granularity": "tiles", "sizes": 4})
    finally:
        GRANULARITIES._entries.pop("tiles")


def test_properties_tell_granularities_apart():
    kinds = Rows(), Columns(), Elements(), Tiles()
    assert [kind.is_slice for kind in kinds] == [True, True, False, False]


def test_an_unknown_name_lists_the_known_names_and_suggests_the_closest():
    with pytest.raises(ValueError, match=r"unknown granularity 'rows'; known are 'row'.*Did you mean 'row'"):
        granularity_from("rows")


def test_a_name_can_be_registered_only_once():
    registry = Registry("fruit")
    registry.register("pear")(1)
    with pytest.raises(ValueError, match="already a fruit named 'pear'"):
        registry.register("pear")(2)
    assert (registry["pear"], list(registry), "pear" in registry) == (1, ["pear"], True)
