"""Heads: which rows and columns of a weight belong to a head."""

from __future__ import annotations

import pytest

from fggm_peft import ColumnBlocks, Heads, RowBlocks
from fggm_peft.core.granularity import granularity_from


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "q", "query", "key", "value", "k_lin"])
def test_a_head_is_a_block_of_rows_of_an_input_projection(name):
    assert Heads(4).of_weight(f"layers.0.attention.{name}", (32, 48)) == RowBlocks(8)


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "o", "out_lin", "dense"])
def test_a_head_is_a_block_of_columns_of_the_output_projection(name):
    assert Heads(4).of_weight(f"layers.0.attention.{name}", (32, 48)) == ColumnBlocks(12)


@pytest.mark.parametrize(
    "name", ["c_attn", "qkv_proj", "query_key_value", "kv_b_proj", "wo", "up_proj", "experts.3", ""]
)
def test_other_layers_have_no_heads(name):
    with pytest.raises(ValueError, match=rf"attn\.{name} is not a projection of an attention with separate"):
        Heads(4).of_weight(f"attn.{name}", (32, 32))


@pytest.mark.parametrize(("name", "shape"), [("q_proj", (30, 32)), ("o_proj", (32, 30)), ("k_proj", (2, 32))])
def test_a_shape_that_does_not_divide_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"attn\.{name}: granularity='heads\(kv_heads=4\)' does not support"):
        Heads(4).of_weight(f"attn.{name}", shape)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "4"])
def test_the_number_of_heads_is_a_positive_integer(number):
    with pytest.raises(ValueError, match=r"Heads\.kv_heads must be an integer > 0 or None"):
        Heads(number)


def test_names_and_dicts():
    assert granularity_from("heads") == Heads() and granularity_from(Heads(2).to_dict()) == Heads(2)
    assert Heads(2).to_dict() == {"granularity": "heads", "kv_heads": 2} and Heads(2).plural == "heads(kv_heads=2)"
    with pytest.raises(ValueError, match="the number of key/value heads is unknown"):
        Heads().of_weight("attn.q_proj", (32, 32))


def test_the_layers_of_an_attention_share_a_group():
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert {Heads(2).group_of(f"layers.0.self_attn.{name}") for name in names} == {"layers.0.self_attn"}
    assert RowBlocks(2).group_of("layers.0.self_attn.q_proj") == "layers.0.self_attn.q_proj"
