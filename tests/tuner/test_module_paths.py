"""Layer and type of a module, read from its path."""

from __future__ import annotations

import pytest

from fggm_peft.tuner.module_paths import density_grid, parse_path


def grid(*names):
    return density_grid(dict.fromkeys(names, (0.5, 4)))


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
