"""Scores do not depend on how samples are batched, and masks apply to the stack whose positions they describe."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from models import VOCABULARY, fisher_scores, gpt2, llama, t5, token_batches
from peft import get_peft_model
from torch import nn

from fggm_peft import FGGMConfig, input_covariance, select_parameters
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.tuner.target import find_targets

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 8, (samples, length), generator=torch.Generator().manual_seed(seed))


def texts(samples: int = 8, length: int = 8) -> dict:
    ids = tokens(samples, length)
    mask = torch.ones_like(ids)
    mask[1::3, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def classes(samples: int = 8, length: int = 8) -> dict:
    return {"input_ids": tokens(samples, length), "labels": torch.arange(samples) % 2}


def pairs(samples: int = 6, length: int = 6) -> dict:
    labels = tokens(samples, length, seed=1)
    labels[::2, -2:] = -100
    return {**texts(samples, length), "labels": labels}


def xlnet():
    config = tr.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48)
    return tr.XLNetForSequenceClassification(config), ["layer_1", "layer_2"]


def opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tr.OPTForCausalLM(tr.OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=32, **sizes)), "all-linear"


def qwen2_moe():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tr.Qwen2MoeConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, shared_expert_intermediate_size=24, **SIZES, **experts
    )
    return tr.Qwen2MoeForCausalLM(config), ["q_proj", "up_proj", "down_proj", "shared_expert_gate"]


def fsmt():
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    config = tr.FSMTConfig(
        langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, pad_token_id=1, **sizes, **heads
    )
    return tr.FSMTForConditionalGeneration(config), ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]


class Outer(nn.Module):
    """Sequence-first blocks, flat tokens in either order, routed experts and one table for all samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, 16), nn.Embedding(32, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation="gelu")
        self.flat, self.turned, self.pooled = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.conv = nn.Conv1d(16, 16, 1)
        self.head = nn.Linear(16, VOCABULARY)

    def prepare_inputs_for_generation(self):
        """PEFT requires the method."""

    def forward(self, input_ids, **_):
        x = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1])[None])
        x = self.block(x.transpose(0, 1))
        x = x + self.turned(x.reshape(-1, 16)).tanh().view_as(x)
        x = x.transpose(0, 1)
        x = x + self.flat(x.reshape(-1, 16)).tanh().view_as(x)
        x = x + self.conv(x.reshape(-1, 16, 1)).view_as(x)
        for number, expert in enumerate(self.experts):
            chosen = input_ids % 3 == number
            y = torch.zeros_like(x)
            y[chosen] = expert(x[chosen])
            x = x + y
        x = x + self.pooled(x.mean(1))[:, None]
        return tr.modeling_outputs.CausalLMOutput(logits=self.head(x))


def outer(*targets):
    return lambda: (Outer(), list(targets))


def table():
    return gpt2(), ["wpe", "c_attn"]


def mixed_up():
    return t5(), "all-linear"


MODELS = {
    "XLNet": (xlnet, classes, "SEQ_CLS"),
    "OPT": (opt, texts, None),
    "Qwen2-MoE": (qwen2_moe, texts, None),
    "FSMT": (fsmt, pairs, "SEQ_2_SEQ_LM"),
    "T5": (mixed_up, pairs, None),
    "position embeddings of GPT-2": (table, texts, None),
    "nn.TransformerEncoderLayer": (outer("linear1", "linear2"), texts, "CAUSAL_LM"),
    "flat tokens": (outer("flat", "pooled", "conv"), texts, "CAUSAL_LM"),
    "flat tokens, positions first": (outer("turned"), texts, "CAUSAL_LM"),
    "experts": (outer("experts.0", "experts.1", "experts.2"), texts, "CAUSAL_LM"),
    "one table for all samples": (outer("position", "embed"), texts, "CAUSAL_LM"),
}


def scores(build, batches, task_type=None, **config):
    torch.manual_seed(0)
    model, targets = build()
    config = {"target_modules": targets, "task_type": task_type, **config}
    return fisher_scores(get_peft_model(model.eval(), FGGMConfig(**config)), batches)


def split(batch: dict, size: int) -> list[dict]:
    return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, len(batch["labels"]), size)]


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert any(tensor.any() for tensor in expected.values())
    for path in expected:
        torch.testing.assert_close(actual[path], expected[path], rtol=1e-4, atol=1e-4 * float(expected[path].max()))


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize(("build", "data", "task_type"), MODELS.values(), ids=list(MODELS))
def test_scores_do_not_depend_on_the_batch_size(build, data, task_type, granularity):
    """The number of samples is the number of positions, or one that divides it."""
    batch = data()
    alone = scores(build, split(batch, 1), task_type, granularity=granularity)
    for size in (len(batch["labels"]), 4, 3):
        assert_same(scores(build, split(batch, size), task_type, granularity=granularity), alone)


@pytest.mark.parametrize("name", ["OPT", "FSMT", "T5", "flat tokens", "nn.TransformerEncoderLayer"])
def test_forward_statistics_do_not_depend_on_the_batch_size(name):
    build, data, task_type = MODELS[name]
    means = []
    for size in (1, 3, len(data()["labels"])):
        torch.manual_seed(0)
        model, modules = build()
        config = FGGMConfig(target_modules=modules, task_type=task_type)
        model = get_peft_model(model.eval(), config)
        targets = find_targets(model, "default")
        totals = DataPass(model, config, split(data(), size), statistics=["input_second_moment"]).run(targets)
        means.append({path: totals.mean(path, "input_second_moment") for path in targets})
    for other in means[1:]:
        assert_same(other, means[0])


# Masks ------------------------------------------------------------------------------------------


def forward_means(batch: dict) -> dict[str, torch.Tensor]:
    model = get_peft_model(t5().eval(), FGGMConfig(target_modules=["q", "k", "v", "wi", "wo"]))
    targets = find_targets(model, "default")
    totals = DataPass(model, model.peft_config["default"], [batch], statistics=["input_second_moment"]).run(targets)
    return {path: totals.mean(path, "input_second_moment") for path in targets}


def padded(batch: dict, key: str, count: int, value: int) -> dict:
    ends = torch.full((len(batch[key]), count), value)
    return {**batch, key: torch.cat([batch[key], ends], 1)}


@pytest.mark.parametrize("more", [0, 1, 3])
def test_padding_of_one_stack_does_not_change_the_means_of_either(more):
    """Without padding, inputs have 5 positions and labels 8; with 3 more they are equal in width."""
    batch = {"input_ids": tokens(4, 5), "attention_mask": torch.ones(4, 5, dtype=torch.long), "labels": tokens(4, 8, 1)}
    expected = forward_means(batch)
    longer = padded(padded(batch, "input_ids", more, 0), "attention_mask", more, 0)
    assert_same(forward_means(longer), expected)
    longer = padded(batch, "labels", more, -100)
    assert_same(forward_means(longer), expected)
    both = padded(padded(padded(batch, "input_ids", 3 + more, 0), "attention_mask", 3 + more, 0), "labels", more, -100)
    assert_same(forward_means(both), expected)


def test_the_input_covariance_uses_the_mask_of_each_stack():
    batch = {"input_ids": tokens(4, 5), "attention_mask": torch.ones(4, 5, dtype=torch.long), "labels": tokens(4, 8, 1)}
    longer = padded(padded(batch, "input_ids", 3, 0), "attention_mask", 3, 0)
    one, other = (input_covariance(t5().eval(), [data], progress=False) for data in (batch, longer))
    for path in one.inputs:
        torch.testing.assert_close(one[path].factor @ one[path].factor.mT, other[path].factor @ other[path].factor.mT)


@pytest.mark.parametrize("name", ["OPT", "flat tokens", "flat tokens, positions first", "nn.TransformerEncoderLayer"])
def test_the_input_covariance_omits_padding_in_every_layout(name):
    torch.manual_seed(0)
    model, modules = MODELS[name][0]()
    if modules == "all-linear":
        modules = None
    else:
        modules = [name for name in modules if name != "conv"]
        modules = [path for path, _ in model.named_modules() if path.endswith(tuple(modules))]
    batch = texts()
    alone = input_covariance(model.eval(), split(batch, 1), modules=modules, progress=False)
    for size in (8, 4, 3):
        other = input_covariance(model, split(batch, size), modules=modules, progress=False)
        assert other.positions == alone.positions == int(batch["attention_mask"].sum())


# Images -----------------------------------------------------------------------------------------

IMAGE = 49


def llava():
    torch.manual_seed(0)
    text = tr.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=64, **SIZES)
    vision = tr.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **SIZES)
    config = tr.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
    return tr.LlavaForConditionalGeneration(config)


def with_images(*counts: int, length: int = 13) -> dict:
    ids = tokens(len(counts), length)
    for row, count in zip(ids, counts, strict=True):
        row[1 : 1 + 4 * count] = IMAGE
    pixels = torch.randn(sum(counts), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


VISION = r".*vision.*(q_proj|fc1)"
LANGUAGE = r".*language_model.*(q_proj|up_proj)"


def test_one_image_per_sample_is_scored_at_every_batch_size():
    build = lambda: (llava(), f"{VISION}|{LANGUAGE}")  # noqa: E731
    batch = with_images(1, 1, 1)
    assert_same(scores(build, [batch]), scores(build, split(batch, 1)))


@pytest.mark.parametrize("counts", [(2, 0), (0, 2), (2, 1, 0), (1, 2)])
def test_images_that_cannot_be_assigned_raise_an_error(counts):
    for batches in ([with_images(*counts)], [with_images(1, 1), with_images(*counts)]):
        model = get_peft_model(llava(), FGGMConfig(target_modules=VISION))
        with pytest.raises(ValueError, match="batch size 1"):
            select_parameters(model, batches, progress=False)


@pytest.mark.parametrize("counts", [(2, 0), (0, 2), (1, 2)])
def test_the_language_model_is_scored_with_any_images(counts):
    batch, images = with_images(*counts), 0
    singles = []
    for sample, count in enumerate(counts):
        one = {key: value[sample : sample + 1] for key, value in batch.items() if key != "pixel_values"}
        if count:
            one["pixel_values"] = batch["pixel_values"][images : images + count]
        images += count
        singles.append(one)
    build = lambda: (llava(), LANGUAGE)  # noqa: E731
    assert_same(scores(build, [batch]), scores(build, singles))


@pytest.mark.parametrize("counts", [(2, 0), (1, 2), (2, 0, 1)])
def test_a_batch_with_images_is_not_truncated(counts):
    model = get_peft_model(llava(), FGGMConfig(target_modules=LANGUAGE))
    report = select_parameters(model, [with_images(1, 1), with_images(*counts)], num_samples=3, progress=False)
    assert report.samples == 2 + len(counts)


def test_texts_and_images_may_alternate():
    batch = with_images(1, 1)
    text = {key: value for key, value in with_images(0, 0, 0).items() if key != "pixel_values"}
    model = get_peft_model(llava(), FGGMConfig(target_modules=f"{VISION}|{LANGUAGE}"))
    report = select_parameters(model, [text, batch, text, batch], num_samples=None, progress=False)
    assert report.samples == 10


def test_a_likelihood_that_compares_samples_is_not_divided():
    def contrast(model, batch):
        features = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.mean(1)
        return (features @ features.mT).log_softmax(1).diagonal()

    model = get_peft_model(llama(), FGGMConfig())
    report = select_parameters(model, token_batches((3, 4)), log_likelihood=contrast, progress=False)
    assert report.samples == 7
