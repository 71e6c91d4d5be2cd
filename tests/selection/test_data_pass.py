"""The Fisher pass against a naive loop over single samples: heads, layers, padding, checkpointing, dtypes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from models import (
    BERT_HEADS,
    VOCABULARY,
    Twice,
    adapted,
    bert,
    class_batches,
    class_log_likelihood,
    fisher_scores,
    gpt2,
    llama,
    t5,
    token_batches,
)
from torch import nn

from fggm_peft.core.granularity import granularity_from
from fggm_peft.selection.hooks import LayerHooks
from fggm_peft.selection.layout import AXES, Layout
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.selection.recorder import BatchRecorder
from fggm_peft.selection.running_sums import RunningSums
from fggm_peft.tuner.support import unwrapped
from fggm_peft.tuner.target import find_targets


def naive_scores(model: nn.Module, batches, names, granularity: str, log_likelihood=None) -> dict[str, torch.Tensor]:
    """Scores from the full weight gradient of one sample at a time, in the model's own dtype."""
    model = model.eval()
    likelihood = log_likelihood or default_log_likelihood(model, None)
    modules = {name: model.get_submodule(name) for name in names}
    sums = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    count = 0
    for batch in batches:
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            weights = [module.weight.requires_grad_(True) for module in modules.values()]
            gradients = torch.autograd.grad(likelihood(model, one).sum(), weights)
            for (name, module), gradient in zip(modules.items(), gradients, strict=True):
                matrix = gradient.T if type(module).__name__ == "Conv1D" else gradient.flatten(1)
                sums[name] = sums[name] + granularity_from(granularity).reduce(matrix.double().square())
            count += 1
    return {name: value / count for name, value in sums.items()}


def assert_same_scores(model: nn.Module, reference: nn.Module, batches, granularity: str, tolerance: float = 1e-5):
    actual = fisher_scores(model, batches)
    expected = naive_scores(reference, batches, actual, granularity)
    for name in actual:
        scale = expected[name].max()
        assert scale > 0, name
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=1e-3, atol=float(scale) * tolerance, msg=name
        )


@pytest.mark.parametrize("padding", ["left", "right"])
def test_scores_agree_with_the_naive_loop(granularity, padding):
    assert_same_scores(adapted(llama(), granularity), llama(), token_batches(padding=padding), granularity)


@pytest.mark.parametrize("length", [9, 60])
def test_gram_and_direct_form_give_the_same_scores(granularity, length):
    """A 64 x 64 layer uses the direct form for 60 positions and the Gram form for 9."""
    batches = token_batches(sizes=(2, 2), length=length)
    assert_same_scores(adapted(llama(layers=1), granularity), llama(layers=1), batches, granularity)


def test_conv1d_and_embedding_layers_are_scored(granularity):
    targets = ["c_attn", "c_proj", "c_fc", "wte"]
    model = adapted(gpt2(), granularity, target_modules=targets)
    reference = gpt2()
    reference.lm_head.weight = nn.Parameter(
        reference.lm_head.weight.detach().clone()
    )  # untie the head, which is not a target
    assert_same_scores(model, reference, token_batches(padding="right"), granularity)


@pytest.mark.parametrize("padding_idx", [3, VOCABULARY - 1])
def test_the_padding_row_of_an_embedding_has_no_score(granularity, padding_idx):
    """The naive loop gets its gradients from ``nn.Embedding``."""

    def base():
        model = llama()
        model.model.embed_tokens.padding_idx = padding_idx
        return model

    batches = token_batches()
    for batch in batches:
        batch["input_ids"][:, ::3] = padding_idx
    model = adapted(base(), granularity, target_modules=["embed_tokens", "q_proj"])
    assert_same_scores(model, base(), batches, granularity)
    if granularity == "row":
        assert fisher_scores(model, batches)["model.embed_tokens"][padding_idx] == 0


def test_sequence_to_sequence_models_are_scored(granularity):
    batches = token_batches(padding="right")
    assert_same_scores(adapted(t5(), granularity, task_type="SEQ_2_SEQ_LM"), t5(), batches, granularity)


@pytest.mark.parametrize("head", BERT_HEADS)
def test_classifiers_are_scored(head):
    batches = token_batches(padding="right")
    for batch in batches:
        if head == "sequence":
            batch["labels"] = torch.arange(len(batch["input_ids"])) % 3
        elif head == "token":
            batch["labels"] = batch["labels"].clamp(max=2)
    build = lambda: bert(BERT_HEADS[head], num_labels=3)  # noqa: E731
    assert_same_scores(adapted(build(), target_modules=["query", "value", "dense"]), build(), batches, "row")


@pytest.mark.parametrize("labels", ["one number", "several at once"])
def test_regression_and_multi_label_heads_have_a_likelihood(labels):
    batches = token_batches(padding="right")
    count = 1 if labels == "one number" else 4
    for batch in batches:
        size = len(batch["input_ids"])
        batch["labels"] = torch.randn(size) if count == 1 else (torch.rand(size, count) > 0.5).float()
    build = lambda: bert(BERT_HEADS["sequence"], num_labels=count)  # noqa: E731
    assert_same_scores(adapted(build(), target_modules=["query", "value"]), build(), batches, "row")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_scores(granularity, use_reentrant):
    model = adapted(llama(attention_dropout=0.5), granularity)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    assert_same_scores(model, llama(), token_batches(), granularity)


def test_a_layer_called_twice_sums_its_gradients_before_squaring(granularity):
    """The output of the layer may also be modified in place."""
    model = adapted(Twice(), granularity, target_modules=["shared", "embed"])
    batches = class_batches()
    actual = fisher_scores(model, batches, class_log_likelihood)
    expected = naive_scores(Twice(), batches, ["shared", "embed"], granularity, class_log_likelihood)
    for name in expected:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_accumulate_in_float32(granularity, dtype):
    batches = token_batches()
    actual = fisher_scores(adapted(llama(dtype), granularity), batches)
    expected = naive_scores(llama(), batches, actual, granularity)
    for name in actual:
        assert actual[name].dtype == torch.float32
        correlation = torch.corrcoef(torch.stack([actual[name].double(), expected[name]]))[0, 1]
        assert correlation > 0.99, name


def saved_by_layers(model: nn.Module, batch: dict) -> set[tuple]:
    """Shapes of tensors that a selection pass saves for backward in addition to a plain forward pass."""

    def shapes(forward) -> Counter:
        result: Counter = Counter()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: result.update([tuple(t.shape)]) or t, lambda t: t):
            forward()
        return result

    targets = find_targets(model, "default")
    with LayerHooks(targets, model.get_input_embeddings()) as hooks:
        size = len(batch["input_ids"])
        layout = Layout(size, dict.fromkeys(targets, AXES[0]))
        hooks.recorder = BatchRecorder(RunningSums(targets), layout, torch.zeros(size, dtype=torch.long))
        measured = shapes(lambda: model(**batch))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    return set(measured - shapes(lambda: model(**batch)))


def test_a_pass_saves_nothing_but_inputs(granularity):
    model, batch = adapted(llama(), granularity).eval(), token_batches()[0]
    inputs = {(*batch["input_ids"].shape, width) for width in (64, 96)}
    assert saved_by_layers(model, batch) == inputs


def test_gradients_of_several_forward_passes_are_summed_before_squaring(granularity):
    """Preference losses compare two forward passes."""

    def twice(model, batch):
        likelihood = default_log_likelihood(unwrapped(model), None)
        return likelihood(model, batch) + 0.5 * likelihood(model, batch | {"input_ids": batch["input_ids"].flip(0)})

    batches = token_batches()
    actual = fisher_scores(adapted(llama(), granularity), batches, twice)
    expected = dict.fromkeys(actual, 0)
    for batch in batches:
        for sample in range(len(batch["labels"])):
            one = llama().eval()
            twice(one, batch)[sample].backward()
            for name in actual:
                gradient = one.get_submodule(name).weight.grad.double()
                expected[name] = expected[name] + granularity_from(granularity).reduce(gradient.square()) / 8
    for name in actual:
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max())
        )


class InPlace(nn.Module):
    """Modifies the outputs of its layers in place, in one of several ways."""

    def __init__(self, bias: bool, flat: bool, write):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.first, self.second = nn.Linear(8, 8, bias), nn.Linear(8, 8, bias)
        self.head = nn.Linear(8, 4)
        self.flat, self.write = flat, write

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        hidden = hidden.mean(1) if self.flat else hidden
        for layer in (self.first, self.second):
            hidden = self.write(layer(hidden), hidden)
        hidden = self.head(hidden)
        return hidden if self.flat else hidden.mean(1)


def write_part(y, x):
    y[..., :3] = 0.5 * x[..., :3]
    y[..., 3].mul_(2.0)
    return y


WRITES = {
    "relu_": lambda y, x: torch.relu_(y),
    "add_": lambda y, x: y.add_(x).mul_(0.7),
    "part": write_part,
    "view": lambda y, x: torch.sigmoid_(y.view(-1, 2)).view(y.shape) + y,
    "chunk": lambda y, x: torch.cat([y.chunk(2, -1)[0].tanh(), y.chunk(2, -1)[1] * 2], -1),
    "twice": lambda y, x: y + y.tanh(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_may_modify_the_output_of_a_layer_in_place(bias, flat, write, granularity):
    """With a bias, a three-dimensional output of a linear layer is a view of its product."""

    def build():
        return InPlace(bias, flat, WRITES[write])

    batches = class_batches()
    actual = fisher_scores(
        adapted(build(), granularity, target_modules=["first", "second"]), batches, class_log_likelihood
    )
    expected = naive_scores(build(), batches, ["first", "second"], granularity, class_log_likelihood)
    for name in actual:
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].max())
        )


class ModifiesInput(InPlace):
    def forward(self, input_ids, **_):
        hidden = torch.tanh_(self.first(self.embed(input_ids)))
        self.second(hidden).sum()
        y = self.second(hidden)
        hidden += 1
        return self.head(y + hidden).mean(1)


def test_an_input_modified_in_place_raises_an_error(granularity):
    model = adapted(ModifiesInput(True, False, None), granularity, target_modules=["second"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fisher_scores(model, class_batches(), class_log_likelihood)


def test_a_likelihood_with_an_inner_gradient_is_rejected(granularity):
    def penalised(model, batch):
        value = class_log_likelihood(model, batch)
        (slope,) = torch.autograd.grad(value.sum(), [model.get_base_model().penalised], create_graph=True)
        return value - slope.square().sum()

    class Penalised(InPlace):
        def forward(self, input_ids, **_):
            self.penalised = self.embed(input_ids).detach().requires_grad_()
            return self.head(self.first(self.penalised).tanh()).mean(1)

    model = adapted(Penalised(True, False, None), granularity, target_modules=["first"])
    with pytest.raises(RuntimeError, match="differentiates within itself"):
        fisher_scores(model, class_batches(), penalised)
