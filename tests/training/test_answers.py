"""Losses do not depend on padding, and greedy decoding does not depend on the generation config of the base."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from command_line import succeed
from models import byte_tokenizer, text_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from fggm_peft.training.data import Example, TokenizedExamples
from fggm_peft.training.evaluation import exact_match, score_answers, written_answers

EXAMPLES = [Example("a" * n, "b" * (n % 4 + 1)) for n in range(1, 9)]


def absolute_model(kind: str):
    torch.manual_seed(0)
    size = len(byte_tokenizer())
    if kind == "GPT-2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    if kind == "Bloom":
        return BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=2)).eval()
    sizes = {"hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=size, num_attention_heads=2, max_position_embeddings=64, **sizes)
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["GPT-2", "OPT", "Bloom"])
def test_the_loss_does_not_depend_on_the_padding_side_and_the_batch_size(kind):
    model, found = absolute_model(kind), []
    for side, size in (("left", 8), ("left", 1), ("right", 3)):
        tokenizer = byte_tokenizer()
        tokenizer.padding_side = side
        found.append(score_answers(model, TokenizedExamples(EXAMPLES, tokenizer, 64), size).loss)
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_models_that_ignore_positions_have_the_same_loss():
    model, examples = text_model(), TokenizedExamples(EXAMPLES, byte_tokenizer(), 64)
    expected, forward = score_answers(model, examples), type(model).forward
    model.forward = lambda *args, logits_to_keep=0, **inputs: forward(model, *args, **inputs)
    assert score_answers(model, examples) == expected


def test_the_loss_over_a_large_vocabulary_is_exact():
    """Sums of 50,000 terms in float32 had an error of 5e-5 nats."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50_000, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    model.lm_head.weight.data.mul_(60)
    examples = TokenizedExamples(EXAMPLES, tokenizer, 64)
    found = score_answers(model, examples).loss
    model, losses = model.double(), []
    for example in examples:
        wide = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        losses.append(nn.functional.cross_entropy(wide, torch.tensor(example["labels"][1:]), reduction="none"))
    counted = torch.cat(losses)
    assert found == pytest.approx(counted[counted != 0].mean().item(), abs=1e-5)


def test_batches_have_examples_of_similar_length():
    """A short example is not padded to the length of a long one."""
    model, tokenizer, shapes = absolute_model("GPT-2"), byte_tokenizer(), []
    examples = TokenizedExamples([Example("a", "b" * length) for length in (40, 38, 30, 10, 9, 2)], tokenizer, 64)
    model.register_forward_pre_hook(lambda m, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    score_answers(model, examples, 2)
    lengths = sorted((len(examples[index]["input_ids"]) for index in range(6)), reverse=True)
    assert shapes == [(2, lengths[0]), (1, lengths[2]), (2, lengths[3]), (1, lengths[5])]


def test_commands_do_not_depend_on_the_padding_side(tmp_path):
    """Evaluates and selects with a GPT-2 whose tokenizer pads on the left."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "model")
    absolute_model("GPT-2").save_pretrained(tmp_path / "model")
    rows = [{"prompt": example.prompt, "answer": example.answer} for example in EXAMPLES]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    common = (tmp_path / "model", "--data", tmp_path / "rows.json")
    losses = [succeed("eval", *common, "--batch-size", size)["results"][0]["loss"] for size in (8, 1)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    chosen = []
    for size in (8, 1):
        succeed("select", *common, "--batch-size", size, "-o", tmp_path / str(size), "--density", 0.2)
        chosen.append((tmp_path / str(size) / "adapter_model.safetensors").read_bytes())
    assert chosen[0] == chosen[1]


SETTINGS = {
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [70, 71, 72],
    "min_new_tokens": 5,
    "return_dict_in_generate": True,
    "bad_words_ids": [[70]],
    "begin_suppress_tokens": [70, 71],
    "forced_eos_token_id": 5,
    "num_beams": 3,
    "do_sample": True,
    "temperature": 3.0,
    "exponential_decay_length_penalty": (1, 2.0),
    "sequence_bias": [[[70], -50.0]],
    "num_return_sequences": 2,
    "max_length": 3,
    "renormalize_logits": True,
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_is_greedy_whatever_the_generation_config_says(name):
    model, examples = text_model(), TokenizedExamples(EXAMPLES, byte_tokenizer(), 64)
    greedy = written_answers(model, examples, 4, 8)
    assert len(set(greedy)) > 1
    for key in ("do_sample", name) if name == "temperature" else (name,):
        setattr(model.generation_config, key, SETTINGS[key])
    config = model.generation_config
    assert written_answers(model, examples, 4, 8) == greedy
    assert model.generation_config is config


def test_answers_that_can_never_match_are_counted(tmp_path):
    examples = [Example("abc", "d" * length) for length in (1, 4, 5, 9)]
    model, tokenizer = text_model(), byte_tokenizer()
    with pytest.warns(UserWarning, match=r"2 of 4 answers can never match exactly: .*max_new_tokens=4"):
        exact_match(model, TokenizedExamples(examples, tokenizer, 64), max_new_tokens=4)
    with pytest.warns(UserWarning, match=r"1 of 4 answers .*max_length=7"):
        exact_match(model, TokenizedExamples(examples, tokenizer, 7), max_new_tokens=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_match(model, TokenizedExamples(examples, tokenizer, 64), max_new_tokens=9)


def test_a_truncated_answer_does_not_match(tmp_path):
    """The model writes exactly what is left of the answer."""
    model, tokenizer = text_model(), byte_tokenizer()
    examples = TokenizedExamples([Example("abc", "d")], tokenizer, 64)
    [text] = written_answers(model, examples, 1, 3)
    whole = TokenizedExamples([Example("abc", f"{text}d")], tokenizer, 4)
    with pytest.warns(UserWarning, match="1 of 1"):
        assert exact_match(model, whole, max_new_tokens=3) == 0
