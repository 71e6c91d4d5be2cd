"""The default log-likelihood of the Fisher pass, against the model's own loss."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tr
from models import VOCABULARY, adapted, bert, gpt2, llama, token_batches
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.selection.likelihood import default_log_likelihood

PROMPTED, EVERYWHERE = token_batches(padding="right")[0], token_batches()[1]
EVERYWHERE = {"input_ids": EVERYWHERE["input_ids"], "labels": EVERYWHERE["input_ids"].clone()}
NO_ANSWER = PROMPTED | {"labels": torch.full_like(PROMPTED["labels"], -100)}


def own_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """The model's own log-likelihood of each sample, summed over its answer."""
    result = []
    for sample in range(len(batch["labels"])):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        count = one["labels"][:, 1:].ne(-100).sum()
        result.append(-model(**one).loss * count if count else torch.zeros(()))
    return torch.stack(result)


ONE_TOKEN = {"input_ids": torch.tensor([[3], [4]]), "labels": torch.tensor([[3], [4]])}
BATCHES = {"prompted": PROMPTED, "everywhere": EVERYWHERE, "no answer": NO_ANSWER, "one token": ONE_TOKEN}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("build", [llama, gpt2])
def test_likelihood_and_gradients_agree_with_the_models_own_loss(build, batch):
    model = build().eval()
    actual, expected = default_log_likelihood(model, None)(model, batch), own_loss(model, batch)
    torch.testing.assert_close(actual, expected)
    if expected.requires_grad:
        parameters = list(model.parameters())
        gradients = (torch.autograd.grad(loss.sum(), parameters, allow_unused=True) for loss in (actual, expected))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "targets, positions",
    [(["q_proj"], PROMPTED["labels"][:, 1:].ne(-100).any(0).sum()), (["lm_head"], PROMPTED["labels"].shape[1])],
    ids=["head not a target", "head a target"],
)
def test_the_head_computes_only_positions_of_the_answer_unless_it_is_a_target(targets, positions):
    model = adapted(llama(), target_modules=targets).eval()
    seen = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    default_log_likelihood(model, "CAUSAL_LM")(model, PROMPTED)
    assert seen == [positions]


def test_models_without_logits_to_keep_compute_all_logits():
    model = llama().eval()
    likelihood = default_log_likelihood(model, None)
    expected = likelihood(model, PROMPTED)
    old = copy.copy(model)
    old.forward = lambda input_ids, attention_mask: model(input_ids, attention_mask)
    torch.testing.assert_close(likelihood(old, PROMPTED), expected)
    torch.testing.assert_close(likelihood(model, PROMPTED | {"logits_to_keep": 0}), expected)
    old.forward = lambda input_ids, attention_mask, logits_to_keep=0: model(input_ids, attention_mask)  # as in unsloth
    torch.testing.assert_close(likelihood(old, PROMPTED), expected)


# Sequence classification and question answering -------------------------------------------------------

CLASSES, FLAGS, NUMBERS = torch.tensor([2, 0, 1]), torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]]), torch.randn(3, 3)


@pytest.mark.parametrize(
    ("problem", "count", "labels"),
    [
        (None, 3, CLASSES),
        (None, 3, CLASSES.int()),
        (None, 3, CLASSES[:, None]),
        (None, 3, FLAGS.float()),
        (None, 1, NUMBERS[:, 0]),
        (None, 1, NUMBERS[:, :1]),
        (None, 1, CLASSES.float()),
        ("regression", 3, NUMBERS),
        ("regression", 1, NUMBERS[:, :1]),
        ("regression", 3, FLAGS.float()),
        ("multi_label_classification", 3, FLAGS.float()),
        ("multi_label_classification", 1, FLAGS[:, :1].float()),
        ("single_label_classification", 3, CLASSES),
        ("single_label_classification", 3, CLASSES[:, None]),
    ],
)
def test_the_problem_type_of_the_config_decides_the_likelihood_as_in_transformers(problem, count, labels):
    model = bert(BertForSequenceClassification, num_labels=count, problem_type=problem).eval()
    inputs = {"input_ids": PROMPTED["input_ids"]}
    actual = default_log_likelihood(model, "SEQ_CLS")(model, inputs | {"labels": labels})
    assert actual.shape == (3,)
    twin = copy.deepcopy(model)
    if problem is None and labels.dtype == torch.float32 and labels.dim() == 1:
        labels = labels[:, None]  # transformers squeezes both
    loss = -twin(**inputs, labels=labels.long() if labels.dtype == torch.int32 else labels).loss
    factor = {"regression": count / 2, "multi_label_classification": count}.get(twin.config.problem_type, 1)
    torch.testing.assert_close(actual.mean(), loss * factor)


def test_labels_of_another_shape_than_the_head_raise_an_error():
    for problem, count, labels in (
        ("regression", 3, CLASSES.float()),
        ("multi_label_classification", 3, CLASSES.float()),
        ("single_label_classification", 3, FLAGS),
        (None, 1, NUMBERS),
    ):
        model = bert(BertForSequenceClassification, num_labels=count, problem_type=problem)
        with pytest.raises(ValueError, match=r"labels are \[.*\], but the logits are"):
            default_log_likelihood(model, "SEQ_CLS")(model, {"input_ids": PROMPTED["input_ids"], "labels": labels})


@pytest.mark.parametrize("end", [[4, 5, 6], [[4], [5], [6]], [4, 99, -1]])
def test_the_likelihood_of_an_answer_in_a_text_agrees_with_the_models_own_loss(end):
    model = bert(BertForQuestionAnswering).eval()
    batch = {"input_ids": PROMPTED["input_ids"], "end_positions": torch.tensor(end)}
    batch["start_positions"] = torch.tensor([1, 3, 2]).view_as(batch["end_positions"])
    actual = default_log_likelihood(model, None)(model, batch)
    for sample in range(3):
        positions = [batch[name].reshape(-1)[sample] for name in ("start_positions", "end_positions")]
        output = model(input_ids=batch["input_ids"][sample : sample + 1])
        scores = [output.start_logits.log_softmax(1)[0], output.end_logits.log_softmax(1)[0]]
        inside = [log[p] for log, p in zip(scores, positions, strict=True) if 0 <= p < log.numel()]
        torch.testing.assert_close(actual[sample], sum(inside))
    with pytest.raises(ValueError, match="no labels"):
        default_log_likelihood(model, "QUESTION_ANS")(model, {"input_ids": batch["input_ids"]})


# Encoder-decoders and decoders under one name ------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
STACKS = {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
}


def labels_of(samples: int = 2, length: int = 6) -> torch.Tensor:
    labels = torch.randint(3, 40, (samples, length), generator=torch.Generator().manual_seed(0))
    labels[1, -2:] = -100
    return labels


def whisper():
    config = tr.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **STACKS,
    )
    return tr.WhisperForConditionalGeneration(config), {"input_features": torch.randn(2, 8, 40)}


def speech_to_text():
    config = tr.Speech2TextConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=32,
        **STACKS,
    )
    return tr.Speech2TextForConditionalGeneration(config), {"input_features": torch.randn(2, 40, 8)}


def bart():
    config = tr.BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=32, **STACKS)
    return tr.BartForConditionalGeneration(config), {"input_ids": labels_of().clamp(min=3)}


def image_to_text():
    encoder = tr.ViTConfig(image_size=8, patch_size=4, **SMALL)
    decoder = tr.BertConfig(vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True, **SMALL)
    config = tr.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tr.VisionEncoderDecoderModel(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


def llava():
    text = tr.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **SMALL)
    vision = tr.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **SMALL)
    config = tr.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49, image_seq_length=4)
    return tr.LlavaForConditionalGeneration(config), {"input_ids": labels_of().clamp(min=3)}


@pytest.mark.parametrize("build", [whisper, speech_to_text, bart, image_to_text, llava])
def test_the_config_distinguishes_encoder_decoders(build):
    """The likelihood is the model's own loss, and the model trains, as with LoRA."""
    torch.manual_seed(0)
    model, batch = build()
    batch["labels"] = labels_of()
    likelihood = default_log_likelihood(model, None)(model.eval(), batch)
    loss = model(**{key: value.clone() for key, value in batch.items()}).loss
    count = (batch["labels"] if build is not llava else batch["labels"][:, 1:]).ne(-100).sum()
    torch.testing.assert_close(-likelihood.sum() / count, loss)
    for config in (FGGMConfig(target_modules="all-linear", density=0.3), LoraConfig(target_modules="all-linear")):
        adapted = get_peft_model(copy.deepcopy(model), config)
        if isinstance(config, FGGMConfig):
            assert select_parameters(adapted, [batch], progress=False).samples == 2
        adapted(**{key: value.clone() for key, value in batch.items()}).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in adapted.parameters())
