"""Layer and type of a module, read from its path."""

from __future__ import annotations

import pytest

from fggm_peft.tuner.module_paths import density_grid, grid_from_dict, markdown_table, parse_path


def grid(*names, **options):
    return density_grid(dict.fromkeys(names, (0.5, 4)), **options)


@pytest.mark.parametrize(
    ("name", "stack", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers", 3, "mlp.up_proj"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block", 0, "layer.*.DenseReluDense.wi"),
        ("model.layers.2.mlp.experts.7.up_proj", "model.layers", 2, "mlp.experts.*.up_proj"),
        ("lm_head", "", None, "lm_head"),
        ("0", "", 0, "*"),
    ],
)
def test_stack_layer_and_type_are_read_from_the_path(name, stack, layer, kind):
    parsed = parse_path(name)
    assert (parsed.stack, parsed.layer, parsed.kind) == (stack, layer, kind)


def test_missing_modules_leave_cells_empty():
    result = grid("h.0.attn.q", "h.0.mlp.up", "h.1.mlp.up", "lm_head")
    assert (result.kinds, result.layers) == (["q", "up", "lm_head"], ["0", "1", ""])
    assert result.values == [[0.5, None, None], [0.5, 0.5, None], [None, None, 0.5]]


def test_names_are_as_short_as_possible():
    assert grid("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc").kinds == ["attn.c_proj", "mlp.c_proj", "c_fc"]
    assert grid("h.0.dense", "h.0.output.dense").kinds == ["dense", "output.dense"]
    assert grid("encoder.block.0.q", "decoder.block.0.q").layers == ["encoder 0", "decoder 0"]


def test_the_experts_of_a_layer_are_averaged_by_size():
    result = density_grid({"h.0.experts.0.up": (1.0, 10), "h.0.experts.1.up": (0.0, 30)})
    assert result.values == [[0.25]]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, ["0"]), (3, ["0", "1", "2"]), (6, ["0", "1–2", "3", "4–5"]), (30, ["0–6", "7–14", "15–21", "22–29"])],
)
def test_groups_of_layers_contain_all_layers(layers, expected):
    result = density_grid({f"h.{n}.q": (n / layers, 4) for n in range(layers)}, groups=4)
    assert result.layers == expected
    (row,) = result.values
    assert row[0] == pytest.approx(sum(n / layers for n in range(layers // 4 or 1)) / (layers // 4 or 1))


def test_the_markdown_table_leaves_missing_cells_empty():
    lines = markdown_table(density_grid({"h.0.q": (0.3, 4), "h.1.q": (0.12345, 4), "head": (1.0, 4)})).splitlines()
    assert lines[0] == "| | layer 0 | layer 1 | no layer |" and lines[1] == "|---|---|---|---|"
    assert lines[2:] == ["| q | 30 % | 12.3 % |  |", "| head |  |  | 100 % |"]


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"layers": ["0"]}, {"layers": "0", "q": [0.1]}, {"layers": ["0"], "q": [0.1, 0.2]}]
    + [{"layers": ["0"], "q": value} for value in ("x", ["x"], [2.0], [None], [float("nan")])],
)
def test_an_invalid_grid_is_ignored(data):
    assert grid_from_dict(data) is None


def test_a_grid_survives_conversion_to_a_dict():
    result = grid("h.0.q", "h.1.up")
    assert grid_from_dict(result.to_dict()) == result


def test_densities_that_differ_only_by_rounding_are_even():
    assert density_grid({"h.0.q": (0.3, 4), "h.1.q": (0.302, 4)}).is_even
    assert not density_grid({"h.0.q": (0.3, 4), "h.1.q": (0.4, 4)}).is_even
    assert density_grid({"h.0.q": (0.0, 4)}).is_even
