"""Experts, routers and ``nn.MultiheadAttention`` against the model with dense deltas, in float64."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref

import pytest
import torch
from models import (
    VOCABULARY,
    adapted,
    class_batches,
    class_log_likelihood,
    fggm_layers,
    fisher_scores,
    llama,
    logits,
    mixture,
    token_batches,
    train,
)
from peft import PeftModel, get_peft_model
from torch import nn

import fggm_peft.tuner.parameters as parameters_module
from fggm_peft import FGGMConfig, Ledger, SparseDelta, apply_deltas, diff, export_lora, select_parameters
from fggm_peft.core.granularity import granularity_from
from fggm_peft.selection.likelihood import default_log_likelihood
from fggm_peft.tuner.layer_types import FGGMLinear
from fggm_peft.tuner.target import find_targets

ROUTERS = {"Mixtral": "gate", "Qwen3Moe": "gate", "GptOss": "router", "Llama4": "router", "DeepseekV3": "gate"}
TRANSPOSED = {"GptOss", "Llama4"}


@pytest.fixture(params=ROUTERS)
def name(request) -> str:
    return request.param


def parameters(name: str) -> list[str]:
    return ["experts.gate_up_proj", "experts.down_proj", f"{ROUTERS[name]}.weight"]


def with_experts(name: str, granularity: str = "row", dtype=torch.float64, implementation="eager", **config):
    """A model whose experts and routers have random deltas."""
    settings = {"criterion": "random", "density": 0.3, "init_weights": False} | config
    return adapted(mixture(name, dtype, implementation), granularity, target_parameters=parameters(name), **settings)


def entry(tensors: dict, path: str, name: str):
    """The matrix ``[o, i]`` of a path, of a parameter or of its gradient."""
    if f"{path}.weight" in tensors:
        return tensors[f"{path}.weight"]
    stack, _, expert = path.rpartition(".")
    return tensors[stack][int(expert)].mT if name in TRANSPOSED else tensors[stack][int(expert)]


def dense(model: nn.Module, name: str) -> nn.Module:
    """The base model with the dense deltas added to its parameters, all trainable."""
    base = mixture(name, torch.float64)
    tensors = dict(base.named_parameters())
    with torch.no_grad():
        for path, target in find_targets(model, "default").items():
            matrix = entry(tensors, path, name)
            matrix += target.layer.unmatrix(target.layer.get_delta_weight("default")).view(matrix.shape)
    return base


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_forward_and_gradients_are_those_of_dense_weights(name, granularity):
    model, batch = with_experts(name, granularity), token_batches()[0]
    reference = dense(model, name)
    model.train()
    reference.train()
    loss, expected = model(**batch).loss, reference(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in reference.named_parameters()}
    for path, target in find_targets(model, "default").items():
        chosen = target.granularity.gather(entry(gradients, path, name), target.indices)
        torch.testing.assert_close(target.values.grad.double(), chosen, rtol=1e-5, atol=1e-9, msg=path)


def naive_scores(model: nn.Module, name: str, batches, paths, granularity: str) -> dict[str, torch.Tensor]:
    likelihood, sums, count = default_log_likelihood(model, None), dict.fromkeys(paths, 0), 0
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    for batch in batches:
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            found = torch.autograd.grad(likelihood(model, one).sum(), list(parameters.values()), allow_unused=True)
            gradients = {
                key: torch.zeros_like(parameters[key]) if g is None else g
                for key, g in zip(parameters, found, strict=True)
            }
            for path in paths:
                square = entry(gradients, path, name).square()
                sums[path] = sums[path] + granularity_from(granularity).reduce(square)
            count += 1
    return {path: value / count for path, value in sums.items()}


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_fisher_is_that_of_a_loop_over_samples(name, granularity):
    model = with_experts(name, granularity, criterion="fisher", init_weights=True)
    actual = fisher_scores(model, token_batches(padding="right"))
    reference = mixture(name, torch.float64).eval()
    expected = naive_scores(reference, name, token_batches(padding="right"), actual, granularity)
    for path, scores in expected.items():
        torch.testing.assert_close(actual[path].double(), scores, rtol=1e-4, atol=float(scores.max()) * 1e-5, msg=path)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_has_the_same_scores(implementation):
    scores = [
        fisher_scores(with_experts("Mixtral", "row", torch.float32, kind, criterion="fisher"), token_batches())
        for kind in ("eager", implementation)
    ]
    for path, expected in scores[0].items():
        torch.testing.assert_close(scores[1][path], expected, rtol=1e-3, atol=1e-6, msg=path)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_scores_of_experts(use_reentrant):
    plain = fisher_scores(with_experts("Mixtral", criterion="fisher"), token_batches())
    model = with_experts("Mixtral", criterion="fisher")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for path, scores in fisher_scores(model, token_batches()).items():
        torch.testing.assert_close(scores, plain[path], msg=path)


def test_an_expert_without_tokens_has_scores_of_zero_and_an_empty_support():
    model = with_experts("Mixtral", criterion="fisher", init_weights=True)
    with torch.no_grad():  # the router never chooses the last expert
        for layer in model.get_base_model().model.layers:
            layer.mlp.gate.base_layer.weight[3] = -layer.mlp.gate.base_layer.weight[:3].sum(0)
            layer.mlp.experts.base_layer.down_proj[3] = 0
            layer.mlp.experts.base_layer.gate_up_proj[3] = 0
    select_parameters(model, token_batches())
    targets = find_targets(model, "default")
    chosen = {path: len(target.indices) for path, target in targets.items() if path.endswith("_proj.3")}
    assert set(chosen.values()) == {0}
    assert all(len(target.indices) for path, target in targets.items() if path.endswith("_proj.1"))
    train(model, token_batches())


def test_thresholds_apply_to_each_expert_or_to_all_of_them():
    each = with_experts("Mixtral", density=0.25)
    assert {len(t.indices) for p, t in find_targets(each, "default").items() if "gate_up" in p} == {12}
    over_all = with_experts(
        "Mixtral",
        criterion="fisher",
        density=None,
        threshold={"policy": "top_density", "density": 0.25, "scope": "global"},
    )
    select_parameters(over_all, token_batches())
    assert len({len(t.indices) for p, t in find_targets(over_all, "default").items() if "gate_up" in p}) > 1


def test_training_saving_loading_and_merging_are_exact(name, granularity, tmp_path):
    model = with_experts(name, granularity, torch.float32, criterion="fisher", init_weights=True)
    batches = token_batches()
    select_parameters(model, batches)
    losses = train(model, batches[:1] * 4)
    assert losses[-1] < losses[0]
    trained = logits(model, batches[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path)
    assert torch.equal(logits(loaded, batches[0]), trained)
    before = copy.deepcopy(loaded.state_dict())
    loaded.merge_adapter()
    assert torch.equal(logits(loaded, batches[0]), trained)
    loaded.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in loaded.state_dict().items())
    with loaded.disable_adapter():
        base = mixture(name)
        assert torch.equal(logits(loaded, batches[0]), logits(base, batches[0]))
    apply_deltas(base, [SparseDelta.read(tmp_path)])
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[key]), key
    assert torch.equal(logits(merged, batches[0]), trained)


# Targets -------------------------------------------------------------------------------------------


def test_all_linear_says_what_it_skips_and_how_to_include_it(name):
    router = [] if name == "Llama4" else [f"{ROUTERS[name]}.weight"]  # a linear layer
    with pytest.warns(UserWarning, match="skips the experts and routers") as record:
        model = adapted(mixture(name), criterion="random")
    (message,) = [str(w.message) for w in record if "skips" in str(w.message)]
    assert all(part in message for part in [*parameters(name)[:2], *router]) and "bias" not in message
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*skips")
        both = adapted(
            mixture(name), criterion="random", target_modules="all-linear", target_parameters=parameters(name)
        )
    assert set(find_targets(model, "default")) < set(find_targets(both, "default"))
    assert any("gate_up_proj.3" in path for path in find_targets(both, "default"))


def test_a_name_that_no_module_has_gives_a_warning():
    with pytest.warns(RuntimeWarning, match=r"\['w1'\], but no module has such a name"):
        adapted(mixture("Mixtral"), criterion="random", target_modules=["q_proj", "w1"])


@pytest.mark.parametrize("pattern", [r".*\.(q_proj|w1)", r".*\.(q_proj|w1|w2|w3)", r".*(q_proj|experts\.w[123])"])
def test_a_regex_that_names_parts_of_experts_gives_a_warning(pattern):
    """LoRA adapts the experts or raises an error."""
    with pytest.warns(RuntimeWarning, match="names parts of experts that are no modules"):
        adapted(mixture("Mixtral"), criterion="random", target_modules=pattern)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted(mixture("Mixtral"), criterion="random", target_modules=r".*\.(q_proj|v_proj)")


def test_an_unknown_or_unsuitable_parameter_is_an_error():
    with pytest.raises(ValueError, match="No `target_modules` passed but also no `target_parameters` found"):
        adapted(mixture("Mixtral"), target_parameters=["experts.w1"])
    with pytest.raises(ValueError, match="target_parameters must be of type"):
        adapted(mixture("Mixtral"), target_parameters="experts.down_proj")
    model = mixture("GptOss")
    before = str(model)
    with pytest.raises(ValueError, match=r"experts.sinks is a parameter with 1 dimensions|1 dimensions"):
        adapted(model, target_parameters=["experts.down_proj", "self_attn.sinks"])
    assert str(model) == before
    model = mixture("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.down_proj is quantized \(torch.float8_e4m3fn\)"):
        adapted(model, target_parameters=["experts.down_proj"])
    module = nn.Sequential(nn.Linear(2, 2))
    module.matrix = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="matrix is a parameter of the model itself"):
        adapted(module, target_parameters=["matrix"])
    with pytest.raises(ValueError, match="harm decay supports only linear layers, experts and routers"):
        adapted(Attention(True), target_modules=["attention"], harm_decay=1.0)


def test_a_parameter_of_a_linear_layer_is_the_layer():
    model = adapted(llama(), criterion="random", target_parameters=["q_proj.weight"])
    assert isinstance(fggm_layers(model, "default")["model.layers.0.self_attn.q_proj"], FGGMLinear)


def test_several_adapters_share_the_experts():
    model, batch = with_experts("Mixtral", "row", torch.float32), token_batches()[0]
    first = logits(model, batch)
    settings = {"criterion": "random", "init_weights": False, "target_parameters": ["experts.down_proj", "gate.weight"]}
    model.add_adapter("second", FGGMConfig(granularity="column", density=0.5, **settings))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("second")
    second = logits(model, batch)
    assert {path.split(".")[4] for path in find_targets(model, "second")} == {"experts", "gate"}
    assert not torch.equal(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    model.merge_adapter()
    assert torch.equal(logits(model, batch), both)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, batch), second)
    assert torch.equal(logits(pickle.loads(pickle.dumps(copy.deepcopy(model))), batch), second)
    model.unload()
    assert str(model.get_base_model()) == str(mixture("Mixtral"))


# nn.MultiheadAttention -----------------------------------------------------------------------------


class Attention(nn.Module):
    """A classifier with ``nn.MultiheadAttention``; its inputs are ``[b, t]`` for both layouts."""

    def __init__(self, batch_first: bool, **options):
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, input_ids, **_):
        x = self.embed(input_ids) if self.batch_first else self.embed(input_ids).transpose(0, 1)
        keys = x[..., : self.attention.kdim]
        return self.head(self.attention(x, keys, keys)[0].mean(1 if self.batch_first else 0))


ATTENTION = {
    "batch first": lambda: Attention(True),
    "sequence first": lambda: Attention(False),
    "without bias": lambda: Attention(True, bias=False),
    "other keys": lambda: Attention(False, kdim=6, vdim=6),
}


@pytest.mark.parametrize("build", ATTENTION.values(), ids=ATTENTION)
def test_multihead_attention_is_adapted_exactly(build, granularity):
    model = adapted(build(), granularity, criterion="random", target_modules=["attention"], init_weights=False)
    reference, batch = build().double(), class_batches()[0]
    tensors = dict(reference.named_parameters())
    weights = {path.rpartition(".")[2]: t.layer for path, t in find_targets(model, "default").items()}
    assert set(weights) in ({"in_proj", "out_proj"}, {"q_proj", "k_proj", "v_proj", "out_proj"})
    of = lambda name, where: where[f"attention.{name}{'.' if name == 'out_proj' else '_'}weight"]  # noqa: E731
    with torch.no_grad():
        for name, layer in weights.items():
            of(name, tensors).add_(layer.get_delta_weight("default"))
    actual, expected = class_log_likelihood(model, batch), class_log_likelihood(reference, batch)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    actual.sum().backward()
    expected.sum().backward()
    for name, layer in weights.items():
        gradient = layer.granularity["default"].gather(of(name, tensors).grad, layer.fggm_indices["default"])
        torch.testing.assert_close(layer.fggm_values["default"].grad.double(), gradient, rtol=1e-4, atol=1e-6)
    model.eval()  # torch has a fast path without gradients, before and after merging
    with torch.no_grad():
        torch.testing.assert_close(class_log_likelihood(model, batch).double(), expected.detach(), rtol=1e-5, atol=1e-6)
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(class_log_likelihood(merged, batch), class_log_likelihood(model, batch))
    assert type(merged.attention) is nn.MultiheadAttention


@pytest.mark.parametrize("build", ATTENTION.values(), ids=ATTENTION)
def test_fisher_of_multihead_attention_is_that_of_a_loop(build, granularity):
    model = adapted(build(), granularity, target_modules=["attention"])
    actual = fisher_scores(model, class_batches(), class_log_likelihood)
    reference = build().double().eval()
    parameters = {
        name.replace("_weight", "").replace(".weight", ""): parameter
        for name, parameter in reference.attention.named_parameters()
        if "weight" in name
    }
    sums, count = dict.fromkeys(parameters, 0), 0
    for batch in class_batches():
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            found = torch.autograd.grad(class_log_likelihood(reference, one).sum(), list(parameters.values()))
            for name, gradient in zip(parameters, found, strict=True):
                sums[name] = sums[name] + granularity_from(granularity).reduce(gradient.square())
            count += 1
    for name, total in sums.items():
        scores = total / count
        torch.testing.assert_close(
            actual[f"attention.{name}"].double(), scores, rtol=1e-3, atol=float(scores.max()) * 1e-5
        )


def test_an_encoder_layer_of_torch_uses_the_adapted_attention(tmp_path):
    build = lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))  # noqa: E731
    torch.manual_seed(0)
    base, x = build(), torch.randn(2, 5, 8)
    model = get_peft_model(
        copy.deepcopy(base), FGGMConfig(target_modules="all-linear", criterion="random", init_weights=False)
    ).eval()
    assert {"0.self_attn.in_proj", "0.self_attn.out_proj", "0.linear1"} <= set(find_targets(model, "default"))
    with torch.no_grad():
        adapted_output = model(x)
        assert not torch.allclose(adapted_output, base.eval()(x))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert torch.equal(loaded(x), adapted_output)
        torch.testing.assert_close(model.merge_and_unload().eval()(x), adapted_output)


def test_shared_experts_have_one_adapter_and_tied_ones_are_rejected():
    def shared():
        model = mixture("Mixtral")
        model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
        return model

    model, batch = adapted(shared(), criterion="fisher", target_parameters=parameters("Mixtral")[:2]), token_batches()
    select_parameters(model, batch)
    train(model, batch)
    assert len(find_targets(model, "default")) == 8
    trained = logits(model, batch[0])
    assert torch.equal(logits(model.merge_and_unload(), batch[0]), trained)
    assert str(model.get_base_model()) == str(shared())
    tied = mixture("Mixtral")
    tied.model.layers[1].mlp.experts.down_proj = tied.model.layers[0].mlp.experts.down_proj
    with pytest.raises(ValueError, match=r"experts.down_proj shares its tensor with model.layers.1.mlp.experts.down"):
        adapted(tied, target_parameters=["experts.down_proj"])


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_experts_and_routers_are_exported_as_lora(name, granularity, tmp_path):
    model, batch = with_experts(name, granularity, torch.float32), token_batches()[0]
    expected = logits(model, batch)
    ranks = export_lora(model, tmp_path)
    assert {key.partition("mlp.")[2] or key.partition("feed_forward.")[2] for key in ranks} == set(parameters(name))
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-4, atol=1e-4)


def test_the_lora_of_multihead_attention_is_rejected(tmp_path):
    """PEFT 0.21 adds the delta of out_proj twice."""
    model = adapted(Attention(True), criterion="random", target_modules=["attention"], init_weights=False)
    with pytest.raises(ValueError, match="adds the delta of out_proj twice"):
        export_lora(model, tmp_path, base=Attention(True))


# Memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_adapted_copies_are_not_kept_for_backward(implementation, monkeypatch):
    model, made = with_experts("Mixtral", "row", torch.float32, implementation), []

    def recorded(*args, original=parameters_module._adapted):
        result = original(*args)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(parameters_module, "_adapted", recorded)
    loss = model.train()(**token_batches()[0]).loss
    assert made and not any(copied() is not None for copied in made)
    loss.backward()
    assert not any(copied() is not None for copied in made)


def test_values_that_change_before_backward_raise_an_error():
    model = with_experts("Mixtral")
    loss = model.train()(**token_batches()[0]).loss
    with torch.no_grad():
        for target in find_targets(model, "default").values():
            target.values.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Deltas --------------------------------------------------------------------------------------------


def saved_task(folder, name: str, seed: int) -> SparseDelta:
    with_experts(name, "row", torch.float32, seed=seed).save_pretrained(folder)
    return SparseDelta.read(folder)


def test_sums_and_differences_of_deltas_of_experts_load_as_adapters(name, tmp_path):
    batch, tasks = token_batches()[0], [saved_task(tmp_path / str(n), name, n) for n in (1, 2)]
    (tasks[0] + tasks[1]).save(tmp_path / "sum")
    model = mixture(name)
    apply_deltas(model, [tasks[0] + tasks[1]])
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path / "sum")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    found = diff(mixture(name), model)
    assert found.modules.keys() == tasks[0].modules.keys() and not found.others
    found.save(tmp_path / "diff")
    loaded = PeftModel.from_pretrained(mixture(name), tmp_path / "diff")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_a_ledger_removes_the_task_of_experts_exactly(name, tmp_path):
    tasks, ledger = [saved_task(tmp_path / str(n), name, n) for n in (1, 2)], Ledger(tmp_path / "ledger")
    for number in (1, 2):
        ledger.add(str(number), tmp_path / str(number))
    model, expected = mixture(name), mixture(name)
    ledger.apply(model)
    ledger.rollback("1", model)
    apply_deltas(expected, tasks[1:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_the_sum_of_deltas_of_multihead_attention_loads_as_an_adapter(tmp_path):
    batch = class_batches()[0]
    for number in (1, 2):
        settings = {"criterion": "random", "target_modules": ["attention"], "init_weights": False, "seed": number}
        adapted(Attention(True), **settings).save_pretrained(tmp_path / str(number))
    total = SparseDelta.read(tmp_path / "1") + SparseDelta.read(tmp_path / "2")
    total.save(tmp_path / "sum")
    model = Attention(True)
    apply_deltas(model, [total])
    loaded = PeftModel.from_pretrained(Attention(True), tmp_path / "sum")
    torch.testing.assert_close(class_log_likelihood(loaded, batch), class_log_likelihood(model, batch))
