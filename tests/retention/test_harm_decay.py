"""Harm decay on optimizers: what decays, when, and what remains on the optimizer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import llama, mixture, quantized, token_batches
from peft import LoraConfig, ShiraConfig, get_peft_model
from reference import gain_under_decay
from torch import nn

from fggm_peft import (
    FGGMConfig,
    HarmDecay,
    InputCovariance,
    ScoreMass,
    attach_harm_decay,
    input_covariance,
    remember_task,
    select_parameters,
)
from fggm_peft.core.errors import ScoreFileError
from fggm_peft.tuner.files.input_covariance import covariance_of, retained_by
from fggm_peft.tuner.target import find_targets

REFERENCE, TASK = token_batches(seed=1), token_batches(seed=2)


def adapted(model: nn.Module | None = None, **config) -> nn.Module:
    settings = {"granularity": "column", "density": 0.3, "harm_decay": 1.0, "task_type": "CAUSAL_LM", "num_samples": 8}
    return get_peft_model(llama() if model is None else model, FGGMConfig(**{**settings, **config}))


def selected(model: nn.Module | None = None, reference=(REFERENCE,), **config) -> nn.Module:
    model = adapted(model, **config)
    select_parameters(model, TASK, reference=list(reference), progress=False)
    return model


def optimizer_of(model: nn.Module, kind=torch.optim.AdamW, **arguments) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **arguments})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def dense_step(delta: torch.Tensor, covariance: torch.Tensor, sigma: float) -> torch.Tensor:
    return delta.double() @ torch.linalg.inv(torch.eye(len(covariance)).double() + sigma * covariance.double())


def covariance(model: nn.Module | None = None) -> InputCovariance:
    return input_covariance(llama() if model is None else model, REFERENCE, progress=False)


# What decays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
@pytest.mark.parametrize("base", ["dense", "nf4", "int8"])
def test_every_granularity_decays_on_every_base(granularity, base):
    model = selected(
        llama() if base == "dense" else quantized(llama(hidden_size=128, intermediate_size=256), base),
        granularity=granularity,
        harm_decay=100.0,
    )
    with_decay, without = copy.deepcopy(model), model
    optimizers = [optimizer_of(with_decay), optimizer_of(without)]
    attach_harm_decay(with_decay, optimizers[0])
    for index in range(8):
        for net, optimizer in zip((with_decay, without), optimizers, strict=True):
            step(net, optimizer, TASK[index % 3])
    harm = []
    for net in (with_decay, without):
        own = covariance_of(net.peft_config["default"])
        deltas = {
            path: target.granularity.delta_rows(
                torch.arange(target.shape[0]), target.indices, target.values.float(), target.shape
            )
            for path, target in find_targets(net, "default").items()
        }
        harm.append(sum(float((d @ own[path].to(torch.float32).dense() * d).sum()) for path, d in deltas.items()))
    assert harm[0] < 0.5 * harm[1]


def test_a_decay_is_the_dense_formula_on_the_selected_columns():
    model = selected()
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.0)
    target = next(iter(find_targets(model, "default").values()))
    with torch.no_grad():
        target.values.normal_()
    before = target.values.detach().clone()
    decay = HarmDecay(covariance_of(model.peft_config["default"]), strength=0.5, every=2).attach(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.3
    step(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0), TASK[0])  # gradients only
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = None
    optimizer.step()
    assert torch.equal(target.values, before)
    optimizer.param_groups[0]["lr"] = 0.15
    optimizer.step()
    own = decay.covariance[target.path].to(torch.float32).dense()[target.indices.long()][:, target.indices.long()]
    expected = dense_step(before, own, 0.5 * (0.3 + 0.15))
    torch.testing.assert_close(target.values.detach().double(), expected, atol=1e-4, rtol=1e-3)


def test_lora_decays_in_a():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    own = covariance(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.get_delta_weight("default").detach().clone()
    optimizer = optimizer_of(model, torch.optim.SGD)
    HarmDecay(own, strength=5.0, every=1).attach(model, optimizer)
    optimizer.step()
    expected = dense_step(before, own["model.layers.0.self_attn.q_proj"].to(torch.float32).dense(), 5.0 * 1e-2)
    torch.testing.assert_close(layer.get_delta_weight("default").detach().double(), expected, atol=1e-4, rtol=1e-3)


def test_shira_decays_by_the_diagonal():
    model = get_peft_model(llama(), ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    own = covariance(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.shira_weight["default"].detach().clone()
    optimizer = optimizer_of(model, torch.optim.SGD)
    HarmDecay(own, strength=5.0, every=1).attach(model, optimizer)
    optimizer.step()
    energy = own["model.layers.0.self_attn.q_proj"].diagonal()[layer.shira_indices["default"][1].long()]
    torch.testing.assert_close(layer.shira_weight["default"].detach(), before / (1 + 5.0 * 1e-2 * energy))


@pytest.mark.parametrize("offload", [False, True])
def test_weights_that_train_themselves_decay_to_their_start(offload):
    model = llama()
    own, layer = covariance(model), model.model.layers[0].mlp.up_proj
    start = layer.weight.detach().clone()
    optimizer = optimizer_of(model, torch.optim.SGD)
    HarmDecay(own, strength=5.0, every=1, offload=offload).attach(model, optimizer)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(start))
    before = layer.weight.detach() - start
    optimizer.step()
    expected = dense_step(before, own["model.layers.0.mlp.up_proj"].to(torch.float32).dense(), 5.0 * 1e-2)
    torch.testing.assert_close((layer.weight.detach() - start).double(), expected, atol=1e-4, rtol=1e-3)


# Optimizers -----------------------------------------------------------------------------------------


def train(model, optimizer, count=6, first=0):
    for index in range(first, first + count):
        step(model, optimizer, TASK[index % 3])


def values(model) -> list[torch.Tensor]:
    return [target.values.detach().clone() for target in find_targets(model, "default").values()]


def test_a_saved_optimizer_resumes_bit_exactly_within_an_interval():
    model = selected()
    resumed = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    attach_harm_decay(model, optimizer)
    train(model, optimizer, 6)
    with torch.no_grad():
        for mine, other in zip(find_targets(resumed, "default").values(), values(model), strict=True):
            mine.values.copy_(other)
    again = optimizer_of(resumed)
    attach_harm_decay(resumed, again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 6, first=6)
    train(resumed, again, 6, first=6)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(resumed), strict=True))


def test_a_step_that_a_loss_scaler_skips_does_not_decay():
    model = selected()
    optimizer = optimizer_of(model)
    decay = HarmDecay(covariance_of(model.peft_config["default"]), every=1).attach(model, optimizer)
    with torch.no_grad():
        for target in find_targets(model, "default").values():
            target.values.normal_()
    before = values(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(**TASK[0]).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler sets it for a fused optimizer
    decay._after_step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_the_decay_follows_the_schedule_of_each_group():
    model = selected()
    first, *rest = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest, "lr": 1.0}], lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.25)
    with torch.no_grad():
        first.fill_(1.0)
    HarmDecay(covariance_of(model.peft_config["default"]), every=2).attach(model, optimizer)
    optimizer.step()
    assert [group["harm_decay_pending"] for group in optimizer.param_groups] == [0.0, 0.25]
    optimizer.step()
    assert [group["harm_decay_pending"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert torch.equal(first, torch.ones_like(first))


def test_bfloat16_values_decay():
    model = selected(training_dtype="bfloat16")
    optimizer = optimizer_of(model)
    attach_harm_decay(model, optimizer)
    train(model, optimizer, 4)
    assert all(value.dtype == torch.bfloat16 and torch.isfinite(value).all() for value in values(model))


def test_several_optimizers_and_eight_bit_optimizers():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = selected()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [
        bitsandbytes.optim.AdamW8bit(parameters[:3], lr=1e-2),
        torch.optim.AdamW(parameters[3:], lr=1e-2),
    ]
    attach_harm_decay(model, *optimizers)
    before = values(model)
    for index in range(4):
        model(**TASK[index % 3]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [o.param_groups[0]["harm_decay_steps"] for o in optimizers] == [4, 4]
    assert all(not torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_a_compiled_step():
    model, eager = selected(), None
    eager = copy.deepcopy(model)
    optimizers = [optimizer_of(model), optimizer_of(eager)]
    for net, optimizer in zip((model, eager), optimizers, strict=True):
        attach_harm_decay(net, optimizer)
    compiled = torch.compile(optimizers[0].step, backend="eager")
    for index in range(4):
        for net, one in ((model, compiled), (eager, optimizers[1].step)):
            net(**TASK[index % 3]).loss.backward()
            one()
            net.zero_grad()
    for a, b in zip(values(model), values(eager), strict=True):
        torch.testing.assert_close(a, b)


# The life of an adapter --------------------------------------------------------------------------------


def test_nothing_remains_on_the_optimizer():
    model = selected()
    optimizer = optimizer_of(model)
    keys = set(optimizer.param_groups[0])
    decay = attach_harm_decay(model, optimizer)
    train(model, optimizer, 4)
    decay.remove()
    assert set(optimizer.param_groups[0]) == keys and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("size", [{"density": 0.3}, {"density": None, "threshold": ScoreMass(0.5)}], ids=str)
def test_the_decay_follows_another_selection_and_its_reference(size):
    model = selected(**size)
    optimizer = optimizer_of(model)
    attach_harm_decay(model, optimizer)
    train(model, optimizer, 4)
    select_parameters(model, REFERENCE, reference=[TASK], reset=True, progress=False)
    again = copy.deepcopy(model)
    optimizer.state.clear()
    other = optimizer_of(again)
    attach_harm_decay(again, other)
    for group in optimizer.param_groups:
        group.update(harm_decay_steps=0, harm_decay_pending=0.0)
    train(model, optimizer, 4)
    train(again, other, 4)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(again), strict=True))


def test_a_deleted_or_merged_adapter_no_longer_decays():
    model = selected()
    optimizer = optimizer_of(model)
    attach_harm_decay(model, optimizer)
    train(model, optimizer, 3)
    merged = model.merge_and_unload()
    before = copy.deepcopy(merged.state_dict())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


def test_an_adapter_without_harm_decay_attaches_nothing():
    model = selected(harm_decay=0.0, reference=[])
    optimizer = optimizer_of(model)
    assert attach_harm_decay(model, optimizer) is None and not optimizer._optimizer_step_post_hooks


def test_a_loaded_adapter_needs_no_statistics_until_it_trains(tmp_path):
    model = selected()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].harm_decay == 1.0
    assert not list(tmp_path.glob("fggm_retention*"))
    with pytest.raises(ValueError, match="only the setting"):
        attach_harm_decay(loaded, optimizer_of(loaded))


def test_a_rate_far_below_the_presets_is_named():
    model = selected(preset="retain")
    with pytest.warns(UserWarning, match="the learning rate is 5e-05, and the preset is made for about 0.0016"):
        attach_harm_decay(model, optimizer_of(model, lr=5e-5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_harm_decay(model, optimizer_of(model, lr=8e-4))


KINDS = {
    "fggm": selected,
    "lora": lambda: get_peft_model(llama(), LoraConfig(target_modules="all-linear", r=4)),
    "shira": lambda: get_peft_model(llama(), ShiraConfig(target_modules=["q_proj", "down_proj"], r=4)),
    "all weights": lambda: llama(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [32, 128])
def test_statistics_of_a_model_of_another_width_are_rejected(kind, hidden):
    model, other = KINDS[kind](), covariance(llama(hidden_size=hidden, intermediate_size=2 * hidden))
    with pytest.raises(ScoreFileError, match=f"has {hidden} features, but its input has 64"):
        HarmDecay(other).attach(model, optimizer := optimizer_of(model))
    HarmDecay(covariance()).attach(model, optimizer)


@pytest.mark.parametrize("kind", ["fggm", "lora", "shira"])
def test_an_adapter_of_a_layer_without_statistics_is_an_error(kind):
    model = KINDS[kind]()
    few = input_covariance(llama(), REFERENCE, modules=["model.layers.0.self_attn.q_proj"], progress=False)
    with pytest.raises(ScoreFileError, match=r"the input covariance has no module model\.layers"):
        HarmDecay(few).attach(model, optimizer_of(model))


def test_lora_of_parameters_or_embeddings_is_an_error():
    for base, config in (
        (mixture("Mixtral"), {"target_parameters": ["experts.down_proj"]}),
        (llama(), {"target_modules": ["embed_tokens"]}),
    ):
        statistics = covariance(base)
        model = get_peft_model(base, LoraConfig(r=4, **config))
        with pytest.raises(ValueError, match="supports LoRA and SHiRA of linear layers only"):
            HarmDecay(statistics).attach(model, optimizer_of(model))


def test_a_second_harm_decay_on_an_optimizer_is_an_error():
    model = selected()
    optimizer = optimizer_of(model)
    decay = attach_harm_decay(model, optimizer)
    with pytest.raises(ValueError, match="has harm decay already"):
        attach_harm_decay(model, optimizer)
    decay.attach(model, optimizer).remove()
    attach_harm_decay(model, optimizer)


def test_an_adapter_that_is_selected_again_after_another_replaces_its_own_task():
    base = llama()
    model = adapted(base)
    model.add_adapter("two", copy.deepcopy(model.peft_config["default"]))
    tasks = {"default": TASK, "two": token_batches(seed=3)}
    for name in ("default", "two", "default"):
        model.set_adapter(name)
        select_parameters(model, tasks[name], reference=[REFERENCE, "history"], reset=True, progress=False)
    own = input_covariance(base, TASK, progress=False).positions
    reference = input_covariance(base, REFERENCE, progress=False).positions
    assert covariance_of(model.peft_config["default"]).positions == reference + own  # of the other task
    assert retained_by(base).positions == 2 * own
    model.set_adapter("two")
    remember_task(model, tasks["two"], progress=False)
    assert retained_by(base).positions == 2 * own


def test_errors_before_any_work():
    with pytest.raises(ValueError, match="harm_decay must be a number >= 0"):
        FGGMConfig(harm_decay=-1)
    with pytest.raises(ValueError, match="harm_decay weighs the task against a reference"):
        select_parameters(adapted(), TASK, progress=False)
    for strength in (float("nan"), float("inf"), -1, "80"):
        with pytest.raises(ValueError, match="strength"):
            HarmDecay(covariance(), strength=strength)
    for every in (0, 1.5, float("inf"), "4"):
        with pytest.raises(ValueError, match="every"):
            HarmDecay(covariance(), every=every)
    with pytest.raises(TypeError, match=r"a reference is a dataloader.*not a int"):
        select_parameters(adapted(), TASK, reference=5, progress=False)
    with pytest.raises(ValueError, match="nothing to decay"):
        HarmDecay(covariance()).attach(llama(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(TypeError, match="Optimizer"):
        HarmDecay(covariance()).attach(llama(), object())
    with pytest.warns(UserWarning, match="Set harm_decay too"):
        FGGMConfig(criterion="gain_under_decay", granularity="column")
    with pytest.raises(ValueError, match="'row' or 'column'"):
        FGGMConfig(criterion="gain_under_decay", granularity="element", harm_decay=1.0)
    with pytest.raises(ValueError, match="supports only linear layers"):
        adapted(target_modules=["embed_tokens"])


# Tasks --------------------------------------------------------------------------------------------------


def test_the_history_is_added_to_the_next_task_and_keeps_its_size():
    model, sizes = llama(), []
    for number in range(3):
        with pytest.warns(UserWarning, match="history is empty") if number == 0 else pytest.MonkeyPatch.context():
            wrapped = selected(model, reference=["history"])
        own = covariance_of(wrapped.peft_config["default"])
        assert bool(sum(c.factor.any() for c in own.covariances.values())) == (number > 0)
        model = wrapped.merge_and_unload()
        sizes.append(retained_by(model).nbytes)
    assert len(set(sizes)) == 1


def test_a_learned_task_is_read_again_and_counts_once():
    model = selected(reference=["history"])
    before = retained_by(model.get_base_model())
    with torch.no_grad():
        for target in find_targets(model, "default").values():
            target.values.normal_()
    for _ in range(2):
        remember_task(model, TASK, progress=False)
    after = retained_by(model.get_base_model())
    expected = input_covariance(model, TASK, modules=after.inputs, progress=False)
    for path in after.inputs:
        assert torch.equal(after[path].factor, expected[path].factor)
    assert any(not torch.equal(after[path].factor, before[path].factor) for path in after.inputs)
    with pytest.raises(ValueError, match="was not selected with 'history'"):
        remember_task(selected(), TASK, progress=False)


def test_a_task_may_be_remembered_only_after_training():
    model = adapted()
    select_parameters(model, iter(TASK), reference=[REFERENCE, "history"], remember=False, progress=False)
    assert not any(c.factor.numel() for c in retained_by(model.get_base_model()).covariances.values())
    remember_task(model, TASK, progress=False)
    assert retained_by(model.get_base_model()).positions == input_covariance(model, TASK, progress=False).positions


def test_data_of_a_task_that_cannot_be_retained_is_an_error():
    with pytest.raises(ValueError, match="iterator"):
        select_parameters(adapted(), iter(TASK), reference=[REFERENCE, "history"], progress=False)
    with pytest.raises(ValueError, match="pass a dataloader of this task"):
        select_parameters(adapted(criterion="random"), reference=[REFERENCE, "history"], progress=False)


def test_another_selection_of_the_same_adapter_replaces_its_own_task():
    model = adapted()
    for _ in range(2):
        select_parameters(model, TASK, reference=[REFERENCE, "history"], reset=True, progress=False)
    base = model.get_base_model()
    assert retained_by(base).positions == input_covariance(base, TASK, progress=False).positions


def test_a_saved_covariance_is_a_reference(tmp_path):
    covariance().save(tmp_path)
    models = [selected(reference=[source]) for source in (REFERENCE, str(tmp_path))]
    for a, b in zip(*(find_targets(model, "default").values() for model in models), strict=True):
        assert torch.equal(a.indices, b.indices)


def test_statistics_of_more_modules_are_a_reference_and_not_of_fewer():
    whole, few = covariance(), {"target_modules": ["q_proj", "down_proj"]}
    model = llama()
    for _ in range(3):
        wrapped = selected(model, reference=[whole, "history"], **few)
        own = covariance_of(wrapped.peft_config["default"])
        assert sorted(own.inputs) == sorted(find_targets(wrapped, "default"))
        model = wrapped.merge_and_unload()
    part = whole.of_modules({path: own[path].width for path in own.inputs})
    for path in own.inputs:
        assert torch.equal(part[path].factor, whole[path].factor)
    with pytest.raises(ValueError, match="the same target_modules for all tasks"):
        selected(model, reference=[whole, "history"])
    with pytest.raises(ScoreFileError, match="has no module"):
        selected(reference=[part])
    with pytest.raises(ValueError, match="InputCovariance has none"):
        selected(reference=[whole], criterion="gain_per_harm")


@pytest.mark.parametrize("granularity", ["row", "column"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gain_under_decay_selects_what_the_definition_selects(granularity, scope):
    from fggm_peft import TopDensity

    config = {"criterion": "gain_under_decay", "granularity": granularity}
    policy = {"density": None, "threshold": TopDensity(0.3, scope=scope)}
    model = selected(**config, **policy, num_samples=None)
    own, reference = covariance_of(model.peft_config["default"]), {}
    base = llama()
    for batch in TASK:
        for row in range(len(batch["input_ids"])):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            base.zero_grad()
            logits = base(**{k: v for k, v in one.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)
            labels = one["labels"][:, 1:]
            real = labels != -100
            logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][real].sum().backward()
            for path in own.inputs:
                gradient = base.get_submodule(path).weight.grad.double()
                score = gain_under_decay(gradient, own[path].to(torch.float64).dense(), granularity)
                reference[path] = reference.get(path, 0) + score
    chosen = {path: target.indices.tolist() for path, target in find_targets(model, "default").items()}
    if scope == "layer":
        for path, indices in chosen.items():
            best = reference[path].argsort(descending=True)[: len(indices)].sort().values.tolist()
            assert indices == best, path
    else:
        entries = {path: base.get_submodule(path).weight.numel() // len(score) for path, score in reference.items()}
        worst = min(float(reference[path][i]) / entries[path] for path, indices in chosen.items() for i in indices)
        best_left = max(
            float(score[i]) / entries[path]
            for path, score in reference.items()
            for i in range(len(score))
            if i not in chosen[path]
        )
        assert worst >= best_left * (1 - 1e-3)
