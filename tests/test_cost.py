"""``estimate``: every figure against the real sizes."""

from __future__ import annotations

import gc
import json
import struct
from dataclasses import replace

import pytest
import torch
from models import (
    BERT_HEADS,
    adapted,
    bert,
    fggm_layers,
    fisher_scores,
    gpt2,
    llama,
    quantized,
    t5,
    token_batches,
)
from peft import get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertForQuestionAnswering,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from fggm_peft import CostEstimate, FGGMConfig, ParameterBudget, ScoreMass, TopDensity, estimate, select_parameters
from fggm_peft.core.criteria import CRITERIA
from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.threshold import POLICIES
from fggm_peft.selection.running_sums import RunningSums

SMALL = {"batch_size": 2, "sequence_length": 8}


def long_llama(**config):
    return llama(max_position_embeddings=1024, **config)


def sliding_window():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=50, num_hidden_layers=2, sliding_window=16, **sizes))


def batch_of(size: int, length: int) -> dict[str, torch.Tensor]:
    """A batch with one token of padding, like the batches of a trainer."""
    tokens = torch.randint(1, 50, (size, length))
    mask = torch.ones_like(tokens)
    mask[-1, -1] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def step_peak(model: nn.Module, batch: dict) -> tuple[int, int]:
    """(peak memory of the second step by torch's profiler, size of AdamW's state), in bytes."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        gc.collect()  # the profiler would subtract older tensors that are freed during the step
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(**batch).loss.backward()
        optimizer.step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())


def standing(model: nn.Module) -> int:
    """Size of parameters, buffers and bitsandbytes' quantization states."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}.values())


# Memory of a step --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 128), (1, 300), (2, 16)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("build", [long_llama, lambda: long_llama(layers=4, hidden_size=32)], ids=["wide", "deep"])
def test_the_peak_of_a_step_agrees_with_the_profiler(build, kind, checkpointing, size):
    def base():
        return build() if kind == "dense" else quantized(build(), kind)

    found = estimate(
        base(), FGGMConfig(density=0.3), batch_size=size[0], sequence_length=size[1], checkpointing=checkpointing
    )
    model = adapted(base(), density=0.3, criterion="random")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peak, state = step_peak(model, batch_of(*size))
    assert found.optimizer_bytes == state
    assert found.base_bytes + found.value_bytes == standing(model)
    # exact, except that no operator allocates the random states of checkpointing (5056 bytes per layer),
    unseen = 5056 * len(model.get_base_model().model.layers) if checkpointing else 0
    # and that a garbage collection during the step may free older tensors
    difference = standing(model) + state + peak - found.peak_bytes
    assert -0.005 * found.peak_bytes <= difference <= unseen


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_of_unselected_and_selected_adapters_agree_in_every_granularity(granularity, dtype):
    size = {"batch_size": 5, "sequence_length": 120}
    config = FGGMConfig(granularity=granularity, density=0.2)
    before = estimate(long_llama(dtype=dtype), config, **size)
    model = adapted(long_llama(dtype=dtype), granularity, density=0.2)
    unselected = estimate(model, **size)
    select_parameters(model, token_batches(), progress=False)
    after = estimate(model, **size)
    assert before == unselected
    # estimating a selected adapter does not change its support; its selection pass is counted as a step
    assert after.selection_bytes <= before.selection_bytes
    assert before == replace(after, selection_bytes=before.selection_bytes)
    peak, state = step_peak(model, batch_of(5, 120))
    assert after.peak_bytes == pytest.approx(standing(model) + state + peak, rel=0.02)


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (gpt2, ["c_attn", "c_fc"]),
        (t5, "all-linear"),
        (lambda: bert(BERT_HEADS["sequence"]), "all-linear"),
        (lambda: bert(BERT_HEADS["token"]), "all-linear"),
        (sliding_window, "all-linear"),
    ],
)
@pytest.mark.parametrize("size", [(20, 30), (40, 30)], ids=str)
def test_other_model_types_can_be_estimated(build, targets, size):
    config = FGGMConfig(target_modules=targets, density=0.3)
    found = estimate(build(), config, batch_size=size[0], sequence_length=size[1])
    model = adapted(build(), target_modules=targets, density=0.3, criterion="random")
    batch = batch_of(*size)
    batch["labels"] = torch.zeros_like(batch["labels"])
    if isinstance(build(), BERT_HEADS["sequence"]):
        batch["labels"] = batch["labels"][:, 0]
    peak, state = step_peak(model, batch)
    assert found.peak_bytes == pytest.approx(standing(model) + state + peak, rel=0.02)


def test_a_layer_with_one_position_per_sample_is_estimated():
    """BERT's pooler does not copy its weight for few samples, regardless of their length."""
    config = {"density": 0.6, "task_type": "SEQ_CLS"}
    wide = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "max_position_embeddings": 512}

    def build():
        return bert(BERT_HEADS["sequence"], hidden_dropout_prob=0, attention_probs_dropout_prob=0, **wide)

    found = estimate(build(), FGGMConfig(**config), batch_size=2, sequence_length=500)
    model = adapted(build(), criterion="random", **config)
    peak, state = step_peak(model, {**batch_of(2, 500), "labels": torch.zeros(2, dtype=torch.int64)})
    assert found.peak_bytes == pytest.approx(standing(model) + state + peak, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_on_the_meta_device_has_the_same_estimate(checkpointing):
    with torch.device("meta"):
        base = long_llama()
    before = trace(base)
    size = {"batch_size": 8, "sequence_length": 128, "checkpointing": checkpointing}
    on_meta = estimate(base, FGGMConfig(density=0.3), **size)
    assert trace(base) == before
    assert on_meta == estimate(long_llama(), FGGMConfig(density=0.3), **size)


def test_a_custom_model_is_estimated_with_custom_batches():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return CausalLMOutput(loss=self.layer(x).square().sum())

    def batches(size, length):
        return {"x": torch.randn(size, length, 16)}

    config = FGGMConfig(target_modules=["layer"])
    found = estimate(Own(), config, batch_size=7, sequence_length=100, make_batch=batches)
    model = get_peft_model(Own(), FGGMConfig(target_modules=["layer"], criterion="random"))
    peak, state = step_peak(model, batches(7, 100))
    assert found.peak_bytes == standing(model) + state + peak
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        estimate(Own(), config, batch_size=1, sequence_length=2, make_batch=batches, checkpointing=True)
    with pytest.raises(ValueError, match="returns no loss"):
        estimate(
            nn.Sequential(nn.Linear(16, 4)),
            FGGMConfig(target_modules=["0"]),
            **SMALL,
            make_batch=lambda size, length: {"input": torch.ones(size, 16)},
        )


# Sizes of the adapter ----------------------------------------------------------------------------

EXACT = [{"density": 0.3}, {"density": 0.01}, {"density_pattern": {"q_proj": 0.9}}, {"max_units": 3}, {"bias": "none"}]


@pytest.mark.parametrize("config", EXACT, ids=str)
def test_values_and_file_size_of_a_density_are_exact(config, granularity, tmp_path):
    if granularity == "element" and "max_units" in config:
        config = {"density": 0.5}
    found = estimate(llama(), FGGMConfig(granularity=granularity, **config), **SMALL)
    model = adapted(llama(), granularity, **config)
    select_parameters(model, token_batches(), progress=False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable_values == found.least_values == trainable and not found.depends_on_scores
    model.save_pretrained(tmp_path)
    saved = data_bytes(tmp_path / "adapter_model.safetensors")
    assert saved <= found.adapter_bytes <= (1.05 * saved + 200 if granularity == "element" else saved)
    assert found.value_bytes == unencoded_bytes(model)


def unencoded_bytes(model) -> int:
    """Size of the adapter's values and indices in memory."""
    layers = fggm_layers(model, "default").values()
    return sum(part["default"].nbytes for layer in layers for part in (layer.fggm_values, layer.fggm_indices))


def data_bytes(path) -> int:
    """Size of a safetensors file without its header."""
    raw = path.read_bytes()
    return len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]


def test_modules_to_save_are_counted(tmp_path):
    options = {"density": 0.3, "modules_to_save": ["classifier"]}
    found = estimate(bert(BERT_HEADS["sequence"]), FGGMConfig(task_type="SEQ_CLS", **options), **SMALL)
    model = adapted(bert(BERT_HEADS["sequence"]), task_type="SEQ_CLS", criterion="random", **options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert found.trainable_values == sum(p.numel() for p in trainable)
    assert found.gradient_bytes == sum(p.nbytes for p in trainable)
    model.save_pretrained(tmp_path)
    assert found.adapter_bytes == data_bytes(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"budget": 5000},
        {"budget": "3%"},
        {"threshold": ParameterBudget(9000)},
        {"threshold": TopDensity(0.2, scope="global")},
        {"threshold": ScoreMass(0.5)},
        {"threshold": ScoreMass(0.5), "max_units": 4},
        {"threshold": ScoreMass(0.5), "density_pattern": {"q_proj": 0.5}},
    ],
    ids=str,
)
def test_sizes_that_depend_on_scores_are_bounded(config, granularity, tmp_path):
    if granularity == "element":
        config = {name: value for name, value in config.items() if name != "max_units"}
    found = estimate(llama(), FGGMConfig(granularity=granularity, **config), **SMALL)
    model = adapted(llama(), granularity, **config)
    select_parameters(model, token_batches(), progress=False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.least_values <= trainable <= found.trainable_values
    model.save_pretrained(tmp_path)
    assert data_bytes(tmp_path / "adapter_model.safetensors") <= found.adapter_bytes
    if "threshold" not in config or config["threshold"].name != "score_mass":
        assert found.trainable_values - found.least_values < 96  # a budget is exact up to one unit
        assert found.adapter_bytes <= 1.03 * unencoded_bytes(model) + 96 * 4
        assert found.depends_on_scores == (granularity != "element")
    else:
        assert found.depends_on_scores


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad"])
def test_the_size_of_the_optimizer_state_is_exact(name):
    optimizer_class = getattr(torch.optim, name)
    found = estimate(llama(), FGGMConfig(density=0.3), optimizer=optimizer_class, **SMALL)
    model = adapted(llama(), density=0.3, criterion="random")
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad])
    model(**batch_of(2, 8)).loss.backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert found.optimizer_bytes == sum(tensor.nbytes for tensor in tensors)
    if name == "AdamW":  # two float32 numbers per value, and a step count per parameter
        assert found.optimizer_bytes == 8 * found.trainable_values + 4 * 14
    found = estimate(llama(), FGGMConfig(), optimizer=lambda p: torch.optim.SGD(p, momentum=0.9), **SMALL)
    assert found.optimizer_bytes == 4 * found.trainable_values


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_the_size_of_the_scores_agrees_with_the_pass(criterion, granularity, monkeypatch):
    registered = CRITERIA[criterion]
    if not registered.supports(granularity_from(granularity)):
        pytest.skip("the config refuses this granularity")
    decay = {"harm_decay": 1.0} if registered.uses_covariance else {}
    config = FGGMConfig(criterion=criterion, granularity=granularity, **decay)
    found = estimate(llama(), config, **SMALL)
    if config.needs_reference:
        config.reference = "self"
        assert estimate(llama(), config, **SMALL) == found
    if not registered.needs_data:
        assert found.score_bytes == 0
        return
    sums = []
    create = RunningSums.__init__

    def counted(self, *arguments):
        create(self, *arguments)
        sums.append(sum(tensor.nbytes for tensor in self.tensors.values()))

    monkeypatch.setattr(RunningSums, "__init__", counted)
    reference = token_batches(seed=1) if config.needs_reference else None
    model = adapted(llama(), granularity, criterion=criterion, **decay)
    select_parameters(model, token_batches(), None, reference=reference, progress=False)
    assert found.score_bytes == sum(sums)
    bounded = FGGMConfig(criterion=criterion, granularity=granularity, score_memory=1000, **decay)
    assert estimate(llama(), bounded, **SMALL).score_bytes == min(1000, found.score_bytes)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_can_be_estimated(name):
    threshold = ParameterBudget(3000) if name == "parameter_budget" else POLICIES[name]()
    found = estimate(llama(), FGGMConfig(threshold=threshold), **SMALL)
    assert 0 < found.trainable_values <= 61440
    assert found.depends_on_scores == (name != "top_density")


def test_an_estimate_converts_to_text_and_dict():
    found = estimate(llama(), FGGMConfig(budget="1%"), **SMALL)
    assert isinstance(found, CostEstimate) and json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert "at most 614 trainable values" in str(found) and "519 to 614" in str(found)
    assert "peak of a training step" in str(found)


# No side effects ---------------------------------------------------------------------------------


def trace(model):
    return (
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [sorted(vars(module)) for module in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        model.config.use_cache,
        torch.random.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_base_model_is_not_changed(checkpointing, fails):
    base = llama()
    base.model.layers[0].train()
    base.lm_head.weight.requires_grad_(False)
    before, state = trace(base), {name: t.clone() for name, t in base.state_dict().items()}
    config = FGGMConfig(modules_to_save=["lm_head"])
    arguments = {**SMALL, "checkpointing": checkpointing}
    if fails:
        with pytest.raises(RuntimeError, match="out of batches"):
            estimate(base, config, **arguments, make_batch=failing)
    else:
        estimate(base, config, **arguments)
    assert trace(base) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())
    assert config.resolved_budget is None and config.target_modules is None


def failing(batch_size, length):
    raise RuntimeError("out of batches")


def test_an_adapter_is_not_changed():
    model = adapted(llama())
    before = trace(model)
    estimate(model, **SMALL, checkpointing=True)
    assert trace(model) == before
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())
    expected = fisher_scores(adapted(llama()), token_batches())
    select_parameters(model, token_batches(), progress=False)
    torch.testing.assert_close(dict(fisher_scores(model, token_batches())), dict(expected))


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer > 0, got 0"),
        ({"sequence_length": 2.5}, "sequence_length must be an integer > 0, got 2.5"),
        ({"config": FGGMConfig(budget=3)}, "at least 64.*at most 61440"),
        ({"config": None}, "get_peft_model"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(llama(), **{"config": FGGMConfig(), **SMALL, **arguments})


def test_an_adapter_together_with_a_config_is_rejected():
    with pytest.raises(ValueError, match="has an adapter already"):
        estimate(adapted(llama()), FGGMConfig(), **SMALL)


def test_a_batch_of_questions_has_spans():
    def make_batch(batch_size, length):
        batch = batch_of(batch_size, length)
        spans = torch.zeros(batch_size, dtype=torch.int64)
        return {name: batch[name] for name in ("input_ids", "attention_mask")} | {
            "start_positions": spans,
            "end_positions": spans,
        }

    model, config = bert(BertForQuestionAnswering), FGGMConfig(target_modules=["query"], criterion="random")
    assert estimate(model, config, **SMALL) == estimate(model, config, **SMALL, make_batch=make_batch)


def test_a_model_whose_input_is_not_text_needs_make_batch():
    model = llama()
    model.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match=r"takes 'pixel_values'\. Pass make_batch"):
        estimate(model, FGGMConfig(), **SMALL)
