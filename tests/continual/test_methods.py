"""Every registered method trains a stream through one interface and implements its paper."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from learning import Recorder, assert_same_bits, begin, learn
from models import gpt2, llama
from peft import PeftModel
from streams import state
from torch import Tensor, nn
from torch.func import functional_call
from trainers import arguments, examples, losses
from transformers import TrainerCallback, default_data_collator

from fggm_peft.continual.methods import METHODS, make_method
from fggm_peft.continual.methods.method import Method
from fggm_peft.continual.methods.migu import largest_features
from fggm_peft.continual.methods.o_lora import lora_a
from fggm_peft.continual.methods.peft_method import PeftMethod
from fggm_peft.selection import linear_layers
from fggm_peft.tuner import find_targets
from fggm_peft.tuner.files.task_scores import SCORES_FILE, load_record

OPTIONS = {"lora": {"r": 2}, "o_lora": {"r": 2}, "shira": {"r": 2}, "ewc": {"penalty": 10.0}}
OF_TEXT = ("corda", "sdft")  # they need a tokenizer: see test_baselines
CASES = [pytest.param(name, OPTIONS.get(name, {}), id=name) for name in METHODS if name not in OF_TEXT] + [
    pytest.param("lora", {"r": 2, "mode": "carried"}, id="lora-carried"),
    pytest.param("fggm", {"first_task_masked": False}, id="fggm-first-task-plain"),
    pytest.param("fggm", {"criterion": "random", "granularity": "element"}, id="fggm-random-elements"),
    pytest.param("migu", {"first_task_masked": False}, id="migu-first-task-plain"),
]
DECAY = {"harm_decay": 1.0, "reference": ["history"]}
CASES += [
    pytest.param(name, OPTIONS.get(name, {}) | DECAY, id=f"{name}-decay", marks=pytest.mark.filterwarnings("ignore"))
    for name in ("sft", "lora", "shira", "o_lora", "ewc", "migu", "replay", "mofo", "hft")
]


@pytest.fixture(scope="module", autouse=True)
def _cheap_collection():
    """Freeze imported objects: every trainer collects garbage, which takes longer than the training here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def structure(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@dataclass
class Run:
    """Train two tasks; records the state before the first task and after each."""

    method: Method
    structures: list
    states: list
    number_of_hooks: int


def two_tasks(name: str, options: dict, folder: Path, seed: int = 3) -> Run:
    method = make_method(name, **options)
    model = method.prepare(llama(), seed)
    structures, states = [structure(model)], [state(model, method)]
    for number in (0, 1):
        model, _ = learn(method, model, number, folder)
        structures.append(structure(model))
        states.append(state(model, method))
        if number == 0:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "memory": method.memory}, folder / "between.pt")
    return Run(method, structures, states, sum(len(module._forward_hooks) for module in model.modules()))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_method_is_reproducible_and_resumes_bit_exactly(name, options, tmp_path):
    run = two_tasks(name, options, tmp_path / "first")
    assert run.structures[0] == run.structures[1] == run.structures[2] and run.number_of_hooks == 0
    moved = [key for key, tensor in run.states[0].items() if not torch.equal(tensor, run.states[1][key])]
    assert bool(moved) == run.method.trains
    torch.manual_seed(99)  # results must not depend on earlier random numbers
    assert_same_bits(two_tasks(name, options, tmp_path / "again").states[2], run.states[2])

    method = make_method(name, **options)
    model = method.prepare(llama(), 3)
    saved = torch.load(tmp_path / "first" / "between.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    method.memory = saved["memory"]
    model, _ = learn(method, model, 1, tmp_path / "resumed")
    assert_same_bits(state(model, method), run.states[2])


@pytest.mark.parametrize("name", ["lora", "shira", "replay", "fggm"])
def test_the_seed_determines_the_random_numbers_of_a_method(name, tmp_path):
    options = {"criterion": "random"} if name == "fggm" else {"r": 2} if name != "replay" else {}
    a, b = (two_tasks(name, options, tmp_path / str(seed), seed).states[2] for seed in (3, 4))
    assert any(not torch.equal(a[key], b[key]) for key in a if a[key].shape == b[key].shape)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if issubclass(METHODS[name], PeftMethod) and name not in OF_TEXT]
)
def test_a_saved_delta_contains_the_change_of_its_task(name, tmp_path):
    method = make_method(name, **OPTIONS.get(name, {}))
    model, _ = learn(method, method.prepare(llama(), 0), 0, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "0").merge_and_unload()
    for (key, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["fggm", "migu"])
def test_the_first_task_without_a_mask_is_plain_fine_tuning(name, tmp_path):
    plain, _ = learn(make_method("sft"), llama(), 0, tmp_path / "sft")
    first, _ = learn(make_method(name, first_task_masked=False), llama(), 0, tmp_path / name)
    assert_same_bits(first.state_dict(), plain.state_dict())


def test_transposed_weights_are_masked_in_the_correct_orientation(tmp_path):
    start = gpt2()
    name = "transformer.h.0.mlp.c_fc"  # [i, o] = [32, 128]
    for method in (make_method("fggm"), make_method("migu")):
        model, _ = learn(method, gpt2(), 0, tmp_path, max_steps=1)
        moved = model.get_submodule(name).weight != start.get_submodule(name).weight
        assert moved.any(0).sum() == round(0.3 * 128) == moved.sum() / 32
    method = make_method("ewc")
    model, _ = learn(method, gpt2(), 0, tmp_path)
    fisher = per_sample_fisher(model, examples(seed=0))
    torch.testing.assert_close(method.memory[f"{name}.weight"], fisher[f"{name}.weight"], rtol=1e-4, atol=1e-7)


# Names and options ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fgm", {}, "unknown method 'fgm'.*'sft'.*Did you mean 'fggm'"),
        ("fggm", {"densty": 0.1}, "'fggm' has no option 'densty'.*first_task_masked.*density"),
        ("fggm", {"density": 2}, r"density must be in \(0, 1\]"),
        ("sft", {"x": 1}, "'sft' has no option 'x'; legal are harm_decay, reference"),
        ("frozen", {"x": 1}, "'frozen' has no option 'x'; it has none"),
        ("sft", {"harm_decay": -1, "reference": ["history"]}, "harm_decay must be a number >= 0"),
        ("sft", {"harm_decay": float("inf"), "reference": ["history"]}, "harm_decay must be a number >= 0"),
        ("sft", {"harm_decay": 1.0}, "what should the model retain"),
        ("sft", {"reference": ["history"]}, "set harm_decay too"),
        ("lora", {"harm_decay": 1.0, "reference": ["missing.txt"]}, "missing.txt: cannot be read"),
        ("lora", DECAY | {"mode": "carried"}, "zero when a task begins"),
        ("lora", {"init": "loud"}, "init must be of type .*'random', 'quiet'"),
        ("lora", {"init": "quiet"}, "what should the model retain"),
        ("lora", DECAY | {"init_lora_weights": "pissa"}, "zero when a task begins"),
        ("osf", DECAY, "'osf' has no option 'harm_decay'"),
        ("migu", {"threshold": 1.0}, "threshold"),
        ("replay", {"fraction": 0}, "fraction"),
        ("mofo", {"fraction": 0}, "fraction"),
        ("ewc", {"decay": 2}, "decay"),
        ("lora", {"mode": "kept"}, "mode must be of type .*'merged', 'carried'"),
        ("osf", {"effective_rank": 8}, "effective_rank"),
    ],
)
def test_an_unknown_name_or_option_raises_an_error_with_the_valid_ones(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, **options)


def test_options_of_the_adapter_are_options_of_the_method():
    method = make_method("fggm", density=0.1, granularity="column", seed=5, first_task_masked=False)
    config = method.make_config()
    assert (config.density, str(config.granularity), config.seed) == (0.1, "column", 5)


def test_the_classes_declare_what_the_runner_needs():
    assert [name for name in METHODS if METHODS[name].sees_all_tasks] == ["multitask"]
    assert [name for name in METHODS if not METHODS[name].trains] == ["frozen"]


# Comparison with plain loops ---------------------------------------------------------------------


def plain_loop(parameters: dict[str, nn.Parameter], loss_of, batches, lr=1e-2, weight_decay=0.1) -> list[float]:
    """AdamW with a linear schedule and clipping, with the settings of the test trainers."""
    groups = [
        {"params": [p], "weight_decay": 0.0 if "norm" in name else weight_decay} for name, p in parameters.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    values = []
    for step, batch in enumerate(batches):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / len(batches))
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_training_agrees_with_a_plain_loop(name, tmp_path):
    method = make_method(name, **OPTIONS.get(name, {}))
    model = begin(method, method.prepare(llama(), 0), 0, examples())
    twin = copy.deepcopy(model).train()
    recorder = Recorder(model)
    args = arguments(tmp_path, lr_scheduler_type="linear", weight_decay=0.1)
    trainer = method.trainer(model=model, args=args, train_dataset=examples())
    trainer.train()
    trained = {key: p for key, p in twin.named_parameters() if p.requires_grad}
    expected = plain_loop(trained, lambda batch: twin(**batch).loss, recorder.batches)
    assert losses(trainer) == pytest.approx(expected, abs=1e-4) and len(expected) == 4
    for key, parameter in trained.items():
        torch.testing.assert_close(model.get_parameter(key), parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_fggm_agrees_with_a_plain_loop_over_dense_deltas_with_masked_gradients(granularity, tmp_path):
    method = make_method("fggm", granularity=granularity)
    model = begin(method, method.prepare(llama(), 0), 0, examples())
    recorder = Recorder(model)
    args = arguments(tmp_path, lr_scheduler_type="linear", weight_decay=0.1)
    trainer = method.trainer(model=model, args=args, train_dataset=examples())
    trainer.train()
    deltas, masks = {}, {}
    for name, target in find_targets(model, "default").items():
        deltas[f"{name}.weight"] = nn.Parameter(torch.zeros(target.shape))
        masks[f"{name}.weight"] = target.layer.get_delta_weight("default") != 0
    base = llama()

    def loss_of(batch):
        weights = {name: base.get_parameter(name) + delta * masks[name] for name, delta in deltas.items()}
        return functional_call(base, weights, kwargs=batch).loss

    expected = plain_loop(deltas, loss_of, recorder.batches)
    assert losses(trainer) == pytest.approx(expected, abs=1e-4)
    merged = method.end_task(model, trainer, None)
    for name, delta in deltas.items():  # each step moves an entry by about 1e-2, of the tiniest gradients by rounding
        torch.testing.assert_close(merged.get_parameter(name), base.get_parameter(name) + delta, rtol=1e-4, atol=1e-4)


# Gradients of a step ----------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """The gradients that the optimizer receives in the first step, and their batches."""

    def __init__(self):
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def one_step(method: Method, model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The gradients of one step of two batches, and the batches."""
    recorder, callback = Recorder(model), Gradients()
    args = arguments(folder, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=2)
    trainer = method.trainer(model=model, args=args, train_dataset=examples(), callbacks=[callback])
    trainer.train()
    return callback.gradients, recorder.batches


def mean_loss(model: nn.Module, batches) -> Tensor:
    """All examples have equally many labels, so the mean over tokens equals the mean over batches."""
    return sum(model(**batch).loss for batch in batches) / len(batches)


@pytest.mark.parametrize("threshold", [0.7, 0.0])
def test_migu_keeps_the_gradients_of_the_features_with_the_largest_outputs(threshold, tmp_path):
    method = make_method("migu", threshold=threshold)
    model = begin(method, method.prepare(llama(attention_bias=True), 0), 0, examples())
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    twin = copy.deepcopy(model).train()
    got, batches = one_step(method, model, tmp_path)
    outputs: dict[str, list[Tensor]] = {name: [] for name in linear_layers(twin)}
    for name in outputs:
        twin.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: outputs[name].append(y))
    mean_loss(twin, batches).backward()
    for key, parameter in twin.named_parameters():
        expected = parameter.grad
        if (name := key.removesuffix(".weight")) in outputs:
            magnitude = torch.cat(outputs[name]).abs().mean((0, 1))
            magnitude = magnitude / magnitude.sum()
            count = round((1 - threshold) * len(magnitude))
            dropped = magnitude < magnitude.sort(descending=True).values[count - 1]
            assert dropped.sum() == len(magnitude) - count
            expected = expected.masked_fill(dropped[:, None], 0)
        torch.testing.assert_close(got[key], expected, rtol=1e-4, atol=1e-6)


def test_migu_keeps_at_least_one_feature_and_exactly_its_share_of_ties():
    assert largest_features(torch.tensor([1.0, 3.0, 2.0]), 0.99).tolist() == [False, True, False]
    assert largest_features(torch.ones(10), 0.7).sum() == 3


def per_sample_fisher(model: nn.Module, rows: list[dict]) -> dict[str, Tensor]:
    """Mean of squared gradients of each sample's summed log-likelihood."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    names = [f"{name}.weight" for name in linear_layers(model)]
    fisher = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for row in rows:
        batch = default_data_collator([row])
        answer_tokens = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch).loss * answer_tokens
        for name, gradient in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True
        ):
            fisher[name] += gradient.square() / len(rows)
    return fisher


def test_ewc_adds_up_the_exact_fisher_information_of_the_tasks(tmp_path):
    method = make_method("ewc", decay=0.5)
    model = method.prepare(llama(), 0)
    expected = {}
    for number in (0, 1):
        model, _ = learn(method, model, number, tmp_path)
        for name, fisher in per_sample_fisher(model, examples(seed=number)).items():
            expected[name] = 0.5 * expected.get(name, 0) + fisher
    assert method.memory.keys() == expected.keys()
    for name, fisher in method.memory.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-4, atol=1e-7 * float(expected[name].max()))
    start = llama()
    still = [name for name, p in start.named_parameters() if torch.equal(p, model.get_parameter(name))]
    assert {n for n, _ in start.named_parameters()} - set(still) == set(expected)


def test_ewc_uses_the_given_number_of_samples(tmp_path):
    method = make_method("ewc", num_samples=5)
    model, _ = learn(method, method.prepare(llama(), 0), 0, tmp_path)
    expected = per_sample_fisher(model, examples(seed=0)[:5])
    for name, fisher in method.memory.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-4, atol=1e-7 * float(expected[name].max()))


def test_ewc_adds_fisher_times_distance_to_the_gradient_once_per_step(tmp_path):
    method = make_method("ewc", penalty=300.0)
    model, _ = learn(method, method.prepare(llama(), 0), 0, tmp_path)
    fisher = {name: tensor.clone() for name, tensor in method.memory.items()}
    model = begin(method, model, 1, examples())
    anchor = copy.deepcopy(model)
    with torch.no_grad():
        for name in fisher:
            model.get_parameter(name).add_(0.01 * torch.randn_like(fisher[name]))
    twin = copy.deepcopy(model).train()
    got, batches = one_step(method, model, tmp_path)
    mean_loss(twin, batches).backward()
    assert got.keys() == fisher.keys()
    for name in fisher:
        pull = 300.0 * fisher[name] * (twin.get_parameter(name) - anchor.get_parameter(name)).detach()
        assert pull.norm() > 0.01 * twin.get_parameter(name).grad.norm()
        torch.testing.assert_close(got[name], twin.get_parameter(name).grad + pull, rtol=1e-3, atol=1e-5)


def test_a_larger_ewc_penalty_keeps_weights_closer(tmp_path):
    distances = []
    for penalty in (0.0, 1e4):
        method = make_method("ewc", penalty=penalty)
        first, _ = learn(method, method.prepare(llama(), 0), 0, tmp_path)
        anchor, fisher = copy.deepcopy(first), method.memory
        fisher = {name: tensor.clone() for name, tensor in fisher.items()}
        model, _ = learn(method, first, 1, tmp_path, max_steps=8)
        moved = [(f * (model.get_parameter(n) - anchor.get_parameter(n)).square()).sum() for n, f in fisher.items()]
        distances.append(float(sum(moved)))
    assert distances[1] < 0.5 * distances[0]


def test_the_o_lora_penalty_is_the_squared_overlap_with_every_earlier_task(tmp_path):
    method = make_method("o_lora", r=2, penalty=0.7)
    model = method.prepare(llama(), 0)
    earlier: list[dict[str, Tensor]] = []
    for number in (0, 1):
        task = begin(method, model, number, examples())
        args = arguments(tmp_path, max_steps=2)
        trainer = method.trainer(model=task, args=args, train_dataset=examples(seed=number))
        trainer.train()
        earlier.append({name: a.detach().clone() for name, a in lora_a(task).items()})
        model = method.end_task(task, trainer, None)
    model = begin(method, model, 2, examples())
    now = lora_a(model)
    expected = 0.0
    for name, a in now.items():
        for task in earlier:
            expected += 0.7 * float((task[name].double() @ a.detach().double().T).pow(2).sum())
    assert expected > 0
    assert sum(method.penalties(model)).item() == pytest.approx(expected, rel=1e-5)

    twin = copy.deepcopy(model).train()
    got, batches = one_step(method, model, tmp_path)
    mean_loss(twin, batches).backward()
    for name, a in lora_a(twin).items():
        expected = a.grad + sum(2 * 0.7 * (a @ task[name].T @ task[name]) for task in earlier)
        torch.testing.assert_close(
            got[f"base_model.model.{name}.lora_A.default.weight"], expected, rtol=1e-4, atol=1e-5
        )


# FGGM: what it remembers of earlier tasks --------------------------------------------------------


COLUMNS = {"granularity": "column", "density": 0.2}


def test_fggm_uses_its_history_as_reference_also_after_resuming(tmp_path):
    """The second task selects by ``gain_per_harm`` against the scores of the first, also in a new process."""
    options = COLUMNS | {"criterion": "gain_per_harm", "reference": ["history"]}
    method = make_method("fggm", **options)
    model = method.prepare(llama(), 0)
    with pytest.warns(UserWarning, match="the history is empty"):
        model, _ = learn(method, model, 0, tmp_path)
    resumed, again = make_method("fggm", **options), llama()
    again.load_state_dict(model.state_dict())
    again = resumed.prepare(again, 0)
    resumed.memory = copy.deepcopy(method.memory)
    after = [learn(one, base, 1, tmp_path)[0].state_dict() for one, base in ((method, model), (resumed, again))]
    assert len(method.memory["history"]) == len(resumed.memory["history"]) == 2
    assert_same_bits(*after)
    plain = make_method("fggm", **COLUMNS)
    base = plain.prepare(llama(), 0)
    for number in range(2):
        base, _ = learn(plain, base, number, tmp_path)
    assert any(not torch.equal(tensor, after[0][name]) for name, tensor in base.state_dict().items())


def test_fggm_saves_the_scores_of_a_task_with_its_delta(tmp_path):
    method = make_method("fggm", density=0.1)
    model = begin(method, method.prepare(llama(), 0), 0, examples())
    trainer = method.trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=examples())
    trainer.train()
    method.end_task(model, trainer, tmp_path / "task")
    assert (tmp_path / "task" / SCORES_FILE).is_file()
    assert load_record(tmp_path / "task").samples == len(examples())


def test_fggm_resumed_within_a_task_keeps_its_scores(tmp_path):
    """The checkpoint contains the scores, so the history does not depend on interruptions."""
    histories = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        method = make_method("fggm", density=0.1)
        steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
        for run in range(2 if interrupted else 1):
            model = begin(method, method.prepare(llama(), 0), 0, examples())
            args = arguments(folder, **steps)
            trainer = method.trainer(model=model, args=args, train_dataset=examples())
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if run else None)
        assert (trainer.selection_report is None) == interrupted
        method.end_task(model, trainer, None)
        histories.append(state(nn.Module(), method))
    first, second = histories
    assert first.keys() == second.keys() and len(first) > 14
    assert all(torch.equal(tensor, second[key].to(tensor.dtype)) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["fggm", "sft", "lora"])
def test_a_missing_text_is_rejected_at_construction(name):
    with pytest.raises((ValueError, OSError), match=r"missing\.txt"):
        make_method(name, harm_decay=80.0, reference=["history", "missing.txt"])


def test_a_criterion_without_its_reference_is_rejected_at_construction():
    with pytest.raises(ValueError, match="'gain_per_harm' weighs the task against a reference"):
        make_method("fggm", criterion="gain_per_harm")


# Other methods ----------------------------------------------------------------------------------


def test_replay_mixes_the_stated_share_of_every_earlier_task(tmp_path):
    method = make_method("replay", fraction=0.25)
    model = method.prepare(llama(), 7)
    tasks = [examples(count, seed=seed) for seed, count in enumerate((24, 12, 20))]
    for number, data in enumerate(tasks):
        model, trainer = learn(method, model, number, tmp_path, data=data, max_steps=1)
        seen = list(trainer.train_dataset)
        replayed = seen[len(data) :]
        assert seen[: len(data)] == data
        kept = [method.memory[task] for task in range(number)]
        assert [len(rows) for rows in kept] == [6, 3][:number]
        assert all(row in tasks[task] for task, rows in enumerate(kept) for row in rows)
        assert replayed == [row for rows in kept for row in rows]


def test_shira_selects_new_entries_in_every_task():
    method = make_method("shira", r=2)
    model = method.prepare(llama(), 0)
    places = []
    for number in (0, 1):
        model = begin(method, model, number, examples())
        places.append(model.base_model.model.model.layers[0].mlp.up_proj.shira_indices["default"].clone())
        model = method.end_task(model, None, None)
    assert not torch.equal(*places)


def test_osf_keeps_a_larger_subspace_of_the_new_weights_in_every_task(tmp_path):
    method = make_method("osf", effective_rank=0.5, growth=0.2)
    model = method.prepare(llama(), 0)
    ranks = []
    for number in range(4):
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        adapted = begin(method, model, number, examples())
        layer = adapted.base_model.model.model.layers[0].mlp.up_proj
        ranks.append(layer.effective_rank["default"])
        torch.testing.assert_close(
            layer._osf_S_low_init["default"], torch.linalg.svdvals(before)[ranks[-1] :], rtol=1e-4, atol=1e-5
        )
        trainer = method.trainer(model=adapted, args=arguments(tmp_path, max_steps=1), train_dataset=examples())
        trainer.train()
        model = method.end_task(adapted, trainer, None)
        assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert ranks == [int(64 * share) for share in (0.5, 0.7, 0.9, 0.95)]
