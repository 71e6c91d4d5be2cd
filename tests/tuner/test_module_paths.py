"""Layer and type of a module, read from its path."""

from __future__ import annotations

import pytest

from fggm_peft.tuner.target import layer_and_type


@pytest.mark.parametrize(
    ("path", "layer", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "mlp.up_proj"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0", "layer.*.DenseReluDense.wi"),
        ("model.layers.2.mlp.experts.7.up_proj", "model.layers.2", "mlp.experts.*.up_proj"),
        ("lm_head", "", "lm_head"),
        ("0", "0", "*"),
    ],
)
def test_layer_and_type_are_read_from_the_path(path, layer, kind):
    assert layer_and_type(path) == (layer, kind)
