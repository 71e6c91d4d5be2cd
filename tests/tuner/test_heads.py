"""Adapters of attention heads: the query, key, value and output layers select the same heads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import adapted, bert, fisher_scores, gpt2, llama, logits, mixture, t5, token_batches
from peft import PeftModel
from reference import above_mean, holding, relative_error, top_k, within_bounds
from transformers import BertForMaskedLM, Phi3Config, Phi3ForCausalLM

from fggm_peft import (
    AdapterFileError,
    ColumnBlocks,
    FGGMConfig,
    Heads,
    MeanPlusStd,
    ParameterBudget,
    RowBlocks,
    ScoreMass,
    SparseDelta,
    TopDensity,
    diff,
    estimate,
    export_lora,
    input_covariance,
    select_parameters,
)
from fggm_peft.retention import HarmDecay
from fggm_peft.selection.regret import split_half_scores
from fggm_peft.tuner.support import choose_supports, forecast_supports, selected_together
from fggm_peft.tuner.target import find_targets

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
KV_HEADS = [2, 4]  # grouped-query attention and multi-head attention, with four query heads


def with_heads(model=None, targets=NAMES, **config):
    return adapted(llama() if model is None else model, "heads", target_modules=targets, **config)


def attentions(model, adapter_name="default") -> dict[str, list[int]]:
    """Module path of each attention -> its heads. All of its layers must have the same."""
    heads: dict[str, list[int]] = {}
    for path, target in find_targets(model, adapter_name).items():
        indices = target.indices.tolist()
        assert heads.setdefault(path.rpartition(".")[0], indices) == indices
    return heads


def head_scores(model, batches, kv_heads: int) -> torch.Tensor:
    """``[layers, heads]`` float64: the mean over samples of the squared gradient of all weights of a head."""
    model = copy.deepcopy(model).double().eval()
    samples = [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in batches
        for row in range(len(batch["labels"]))
    ]
    scores = torch.zeros(len(model.model.layers), kv_heads, dtype=torch.float64)
    for sample in samples:
        labels = sample.pop("labels")[0, 1:]
        loss = torch.nn.functional.cross_entropy(model(**sample).logits[0, :-1], labels, reduction="sum")
        model.zero_grad()
        loss.backward()
        for layer, block in enumerate(model.model.layers):
            attention = block.self_attn
            for head in range(kv_heads):
                for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
                    size = len(weight) // kv_heads
                    scores[layer, head] += weight.grad[head * size : (head + 1) * size].square().sum()
                size = attention.o_proj.weight.shape[1] // kv_heads
                scores[layer, head] += attention.o_proj.weight.grad[:, head * size : (head + 1) * size].square().sum()
    return scores / len(samples)


# Selection ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_the_score_of_a_head_is_the_fisher_information_of_all_its_weights(kv_heads):
    base, batches = llama(num_key_value_heads=kv_heads), token_batches()
    expected = head_scores(base, batches, kv_heads)
    model = with_heads(base, density=0.5)
    targets, config = find_targets(model, "default"), model.peft_config["default"]
    assert config.granularity == Heads(kv_heads)
    assert [targets[f"model.layers.0.self_attn.{name}"].granularity for name in NAMES] == [
        RowBlocks(64 // kv_heads),
        RowBlocks(16),
        RowBlocks(16),
        ColumnBlocks(64 // kv_heads),
    ]
    scores = fisher_scores(model, batches)
    heads = selected_together(targets, config)
    assert list(heads) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    actual = torch.stack([layer.scores(scores.__getitem__) for layer in heads.values()])
    assert relative_error(actual, expected) < 1e-4
    report = select_parameters(model, batches, progress=False)
    assert report.granularity == f"heads(kv_heads={kv_heads})" and report.density == pytest.approx(0.5)
    best = [sorted(row.topk(kv_heads // 2).indices.tolist()) for row in expected]
    assert list(attentions(model).values()) == best
    for module in report.modules:
        layer = int(module.name.split(".")[2])
        share = expected[layer, best[layer]].sum() / expected[layer].sum()
        assert module.chosen == kv_heads // 2 and module.score_share == pytest.approx(float(share), rel=1e-4)


POLICIES = [
    policy
    for scope in ("layer", "global")
    for policy in (TopDensity(0.4, scope=scope), ScoreMass(0.61, scope=scope), MeanPlusStd(0.217, scope=scope))
]
"""No sum of integers is exactly at these bounds, where float32 ranks may round to either side."""
MODELS: dict[int, tuple] = {}


def reference_choice(policy, scores: list[list[int]], costs: list[int]) -> list[list[int]]:
    if policy.scope == "layer" and len(scores) > 1:
        return [reference_choice(policy, [vector], [1])[0] for vector in scores]
    if isinstance(policy, ScoreMass):
        return holding(scores, costs, policy.fraction)
    if isinstance(policy, MeanPlusStd):
        return above_mean(scores, costs, policy.k)
    if policy.scope == "layer":
        return [top_k(vector, max(1, round(policy.density * len(vector)))) for vector in scores]
    total = sum(cost * len(vector) for vector, cost in zip(scores, costs, strict=True))
    return within_bounds(scores, costs, getattr(policy, "count", 0) or round(policy.density * total), None)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    kv_heads=st.sampled_from(KV_HEADS),
    policy=st.sampled_from([*POLICIES, ParameterBudget(12_288), ParameterBudget(20_000)]),
)
def test_policies_select_whole_heads_also_with_equal_scores(data, kv_heads, policy):
    if kv_heads not in MODELS:
        # the second layer has fewer targets, so that its heads have another size
        model = with_heads(
            llama(num_key_value_heads=kv_heads), targets=r".*layers\.(0\..*|1\..*[qo])_proj", exclude_modules=r".*mlp.*"
        )
        MODELS[kv_heads] = model, find_targets(model, "default")
    _, targets = MODELS[kv_heads]
    scores = {
        path: torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=kv_heads, max_size=kv_heads)))
        for path in targets
    }
    scores = {path: vector.float() for path, vector in scores.items()}
    config = FGGMConfig(granularity=Heads(kv_heads), threshold=policy)
    heads = selected_together(targets, config)
    sums = [sum(scores[path] for path in layer.targets).tolist() for layer in heads.values()]
    costs = [layer.unit_size for layer in heads.values()]
    chosen = choose_supports(targets, config, scores.__getitem__)
    expected = reference_choice(policy, sums, costs)
    for layer, indices in zip(heads.values(), expected, strict=True):
        assert [chosen[path].indices.tolist() for path in layer.targets] == [indices] * len(layer.targets)
    spent = sum(len(chosen[path].indices) * target.unit_size for path, target in targets.items())
    assert spent <= forecast_supports(targets, config).most


def test_regret_compares_whole_heads():
    model = with_heads(density=0.5)
    targets, config = find_targets(model, "default"), model.peft_config["default"]
    halves = [{path: torch.rand(2) for path in targets} for _ in range(2)]
    pairs = split_half_scores(targets, config, lambda path, half: halves[half][path])
    for layer in range(2):
        paths = [f"model.layers.{layer}.self_attn.{name}" for name in NAMES]
        first, second = (sum(scores[path] for path in paths) for scores in halves)
        selected = float(second[first.argmax()] + first[second.argmax()])
        for path in paths:
            assert pairs[path] == pytest.approx((selected, float(first.max() + second.max())))


def test_limited_score_memory_keeps_the_layers_of_an_attention_together():
    supports = []
    for memory in (None, 64):  # bytes of the running sums of one attention
        model = with_heads(density=0.5, score_memory=memory)
        select_parameters(model, token_batches(), progress=False)
        supports.append(attentions(model))
    assert supports[0] == supports[1]
    with pytest.raises(ValueError, match=r"the scores of model\.layers\.0\.self_attn alone take 64 bytes"):
        select_parameters(with_heads(score_memory=63), token_batches(), progress=False)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_reference_and_the_history_of_tasks(scope):
    config = {"criterion": "gain_per_harm", "threshold": TopDensity(0.5, scope=scope)}
    model = with_heads(**config)
    report = select_parameters(model, token_batches(), reference=[token_batches(seed=1)], progress=False)
    assert sum(map(len, attentions(model).values())) == 2 and 0 <= report.regret <= 0.25
    base = model.merge_and_unload()
    second = with_heads(base, **config)
    select_parameters(second, token_batches(seed=2), reference="history", progress=False)
    assert sum(map(len, attentions(second).values())) == 2


def test_one_density_for_the_layers_of_an_attention():
    with pytest.raises(ValueError, match=r"q_proj, .*o_proj select the same units, but density_pattern gives them"):
        with_heads(density_pattern={"q_proj": 0.5})
    model = with_heads(density=0.5, density_pattern={r"model\.layers\.1\..*": 1.0}, criterion="random")
    assert [len(heads) for heads in attentions(model).values()] == [1, 2]


# Training and files -------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_an_adapter_of_heads_trains_saves_loads_merges_and_exports(kv_heads, tmp_path):
    def base():
        return llama(num_key_value_heads=kv_heads)

    batches = token_batches()
    model = with_heads(base(), density=0.5, harm_decay=1.0)
    cost = estimate(
        base(), FGGMConfig(granularity="heads", density=0.5, target_modules=NAMES), batch_size=2, sequence_length=8
    )
    report = select_parameters(model, batches, reference=[token_batches(seed=1)], progress=False)
    assert cost.trainable_values == sum(module.parameters for module in report.modules)
    decay = HarmDecay(input_covariance(base(), batches, progress=False), 1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    decay.attach(model, optimizer)
    for _ in range(2):
        model(**batches[0]).loss.backward()
        optimizer.step()
    expected = logits(model, batches[0])
    assert not torch.allclose(expected, logits(base(), batches[0]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(logits(loaded, batches[0]), expected) and attentions(loaded) == attentions(model)
    assert loaded.peft_config["default"].granularity == Heads(kv_heads)
    delta = SparseDelta.read(tmp_path / "adapter")
    total = 0.5 * delta + 0.5 * delta
    for path, module in delta.modules.items():
        assert (
            module.granularity == total.modules[path].granularity == find_targets(loaded, "default")[path].granularity
        )
        assert torch.equal(total.modules[path].values, module.values)
    total.save(tmp_path / "sum")
    again = PeftModel.from_pretrained(base(), tmp_path / "sum")
    assert torch.equal(logits(again, batches[0]), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batches[0]), expected)
    found = diff(base(), merged, Heads(kv_heads))
    assert all(torch.equal(found.modules[path].indices, module.indices) for path, module in delta.modules.items())
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=base())
    exported = PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(logits(exported, batches[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_file_with_another_number_of_heads_is_refused(tmp_path):
    model = with_heads(density=0.5, criterion="random")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["granularity"] == {"granularity": "heads", "kv_heads": 2}
    for number, problem in ((4, r"expected floating-point values \[.*\]"), (None, "unknown"), (3, "does not support")):
        file.write_text(json.dumps({**saved, "granularity": {"granularity": "heads", "kv_heads": number}}))
        with pytest.raises(AdapterFileError, match=problem):
            SparseDelta.read(tmp_path)
        if number:
            with pytest.raises(
                ValueError, match=rf"has 2 key/value heads, but granularity='heads\(kv_heads={number}\)'"
            ):
                PeftModel.from_pretrained(llama(), tmp_path)


def test_weighted_adapters_keep_whole_heads():
    model = with_heads(density=0.5, criterion="random", init_weights=False)
    model.add_adapter(
        "other",
        FGGMConfig(
            granularity="heads", density=0.5, criterion="random", seed=3, target_modules=NAMES, init_weights=False
        ),
    )
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both")
    expected = [
        sorted({*a, *b}) for a, b in zip(attentions(model).values(), attentions(model, "other").values(), strict=True)
    ]
    assert list(attentions(model, "both").values()) == expected


# Models -------------------------------------------------------------------------------------------


def test_the_number_of_heads_of_other_models():
    model = with_heads(t5(), ["q", "k", "v", "o"], density=0.25)
    assert model.peft_config["default"].granularity == Heads(4)
    assert len(selected_together(find_targets(model, "default"), model.peft_config["default"])) == 6
    model = with_heads(bert(BertForMaskedLM), ["query", "key", "value"], density=0.25)
    assert model.peft_config["default"].granularity == Heads(4)


def phi3():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4}
    return Phi3ForCausalLM(Phi3Config(vocab_size=50, num_key_value_heads=2, pad_token_id=0, **sizes))


@pytest.mark.parametrize(
    ("model", "targets", "path"),
    [
        (gpt2, {"target_modules": ["c_attn"]}, "transformer.h.0.attn.c_attn"),
        (phi3, {"target_modules": ["qkv_proj"]}, "model.layers.0.self_attn.qkv_proj"),
        (phi3, {"target_modules": ["o_proj"]}, "model.layers.0.self_attn.o_proj"),
        (llama, {}, "model.layers.0.mlp.gate_proj"),
        (
            lambda: mixture("Mixtral"),
            {"target_parameters": ["experts.down_proj"]},
            "model.layers.0.mlp.experts.down_proj.0",
        ),
        (lambda: bert(BertForMaskedLM), {"target_modules": ["dense"]}, "attention.output.dense"),
    ],
)
def test_layers_without_heads_are_refused_with_their_name(model, targets, path):
    with pytest.raises(
        ValueError, match="is not a projection of an attention with separate query, key and value"
    ) as error:
        adapted(model(), "heads", **targets)
    assert path in str(error.value).split(" is not a projection")[0]


def test_attentions_with_different_numbers_of_heads_require_adapters_of_their_own():
    model = llama()
    model.model.layers[1].self_attn.head_dim = 8
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: its attention has 4 key/value heads, but"):
        with_heads(model)
    assert with_heads(model, layers_to_transform=1).peft_config["default"].granularity == Heads(4)


def test_an_attention_that_does_not_know_the_size_of_a_head_needs_the_number():
    model = llama(layers=1)
    del model.model.layers[0].self_attn.head_dim
    with pytest.raises(ValueError, match=r"q_proj: the number of key/value heads is unknown; give granularity=Heads"):
        with_heads(model)
    model = adapted(model, Heads(kv_heads=2), target_modules=NAMES, criterion="random")
    assert attentions(model).keys() == {"model.layers.0.self_attn"}


def test_a_criterion_of_rows_or_columns_does_not_rank_heads():
    with pytest.raises(ValueError, match="criterion 'gain_under_decay' requires granularity='row' or 'column'"):
        FGGMConfig(granularity="heads", criterion="gain_under_decay", harm_decay=1.0)
