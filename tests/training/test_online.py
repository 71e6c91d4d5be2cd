"""Online selection: what training's own passes measure is what the Fisher pass finds on the same batches."""

from __future__ import annotations

import pytest
import torch
from models import (
    BERT_HEADS,
    Twice,
    adapted,
    bert,
    class_batches,
    class_log_likelihood,
    llama,
    logits,
    t5,
    token_batches,
)
from torch import nn
from trainers import arguments, delta, examples, losses, make_trainer

from fggm_peft import AdapterNotSelectedError, AlreadyTrainedError, FGGMConfig, online_selection, select_parameters
from fggm_peft.training import FGGMTrainer
from fggm_peft.tuner.files.task_scores import record_of
from fggm_peft.tuner.support import fggm_layers


def scores(model) -> dict[str, tuple[torch.Tensor, ...]]:
    """What was measured, as the history keeps it."""
    return next(iter(record_of(model.peft_config["default"]).scores.values()))


def supports(model) -> dict[str, torch.Tensor]:
    return {name: layer.fggm_indices["default"].clone() for name, layer in fggm_layers(model, "default").items()}


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def measure(model, batches, divide_by: float = 1.0, **inputs) -> online_selection:
    model.train()
    with online_selection(model) as selection:
        for batch in batches:
            (model(**batch, **inputs).loss / divide_by).backward()
    return selection


def assert_same_selection(online, offline, tolerance: float = 1e-4):
    found, expected = scores(online), scores(offline)
    assert found.keys() == expected.keys()
    for name in found:
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=float(b.abs().max()) * tolerance, msg=name)
    assert all(torch.equal(indices, supports(offline)[name]) for name, indices in supports(online).items())


def offline(model, batches, **arguments):
    select_parameters(model, batches, num_samples=None, progress=False, **arguments)
    return model


# The scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
def test_scores_and_choice_are_those_of_the_pass_over_the_same_batches(granularity, padding):
    batches = token_batches(padding=padding)
    model = adapted(llama(), granularity)
    report = measure(model, batches).report
    expected = adapted(llama(), granularity)
    exact = select_parameters(expected, batches, num_samples=None, progress=False)
    assert_same_selection(model, expected)
    assert report.samples == exact.samples == 8
    assert report.agreement == pytest.approx(exact.agreement)
    assert report.parameters == exact.parameters and report.seconds > 0


@pytest.mark.parametrize("factor", [4.0, 1 / 1024])
def test_what_the_loss_is_divided_by_before_backward_does_not_matter(factor):
    """Gradient accumulation divides it, loss scaling multiplies it."""
    model = adapted(llama())
    measure(model, token_batches(), divide_by=factor)
    assert_same_selection(model, offline(adapted(llama()), token_batches()))


def test_a_mean_over_the_tokens_of_several_batches_is_known_by_their_number(granularity):
    batches = token_batches()
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    model = adapted(llama(), granularity)
    measure(model, batches, num_items_in_batch=tokens)
    assert_same_selection(model, offline(adapted(llama(), granularity), batches))


@pytest.mark.parametrize("estimate", [{"fisher_estimate": "sketch", "sketch_size": 2}, {"criterion": "batch_gradient"}])
def test_sketches_and_other_statistics_of_gradients_are_those_of_the_pass(estimate):
    model = adapted(llama(), **estimate)
    measure(model, token_batches())
    assert_same_selection(model, offline(adapted(llama(), **estimate), token_batches()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_every_call_once(granularity, use_reentrant):
    model = adapted(llama(), granularity)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    measure(model, token_batches())
    assert_same_selection(model, offline(adapted(llama(), granularity), token_batches()))


def test_sequence_to_sequence_models_are_measured():
    batches = token_batches(padding="right")
    no_dropout = {"task_type": "SEQ_2_SEQ_LM"}
    models = [adapted(t5(), **no_dropout) for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):  # attention applies its own
                module.dropout = 0.0
    measure(models[0], batches)
    assert_same_selection(models[0], offline(models[1], batches))


@pytest.mark.parametrize("labels", ["classes", "one number", "several at once"])
def test_every_loss_of_a_sequence_classifier_is_scaled_right(labels):
    batches = token_batches(padding="right")
    count = {"classes": 3, "one number": 1, "several at once": 4}[labels]
    for batch in batches:
        size = len(batch["input_ids"])
        batch["labels"] = {
            "classes": torch.arange(size) % 3,
            "one number": torch.randn(size),
            "several at once": (torch.rand(size, 4) > 0.5).float(),
        }[labels]

    def build():
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = bert(BERT_HEADS["sequence"], num_labels=count, **quiet)
        return adapted(base, target_modules=["query", "value"])

    model = build()
    measure(model, batches)
    assert_same_selection(model, offline(build(), batches))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_gradients_are_widened_before_they_are_scaled(dtype):
    model = adapted(llama(dtype))
    measure(model, token_batches(), divide_by=1 / 1024)
    found, expected = scores(model), scores(offline(adapted(llama()), token_batches()))
    for name, (values,) in found.items():
        assert values.dtype == torch.float32
        assert torch.corrcoef(torch.stack([values, expected[name][0]]))[0, 1] > 0.99, name


@pytest.mark.parametrize("scale", [3.0, lambda inputs: len(inputs["input_ids"])], ids=["number", "function"])
def test_a_loss_of_ones_own_says_what_it_is_the_mean_over(scale):
    """And a model may be called without labels; a layer may be called twice in a forward."""
    batches = [batch for batch in class_batches() if len(batch["input_ids"]) == 3]
    build = lambda: adapted(Twice(), target_modules=["shared", "embed"])  # noqa: E731
    model = build()
    model.train()
    with online_selection(model, loss_scale=scale):
        for batch in batches:
            nn.functional.cross_entropy(model(input_ids=batch["input_ids"]), batch["labels"]).backward()
    assert_same_selection(model, offline(build(), batches, log_likelihood=class_log_likelihood))


def test_a_reference_is_passed_over_when_the_support_is_fixed():
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1)]
    config = {"granularity": "column", "criterion": "gain_per_harm"}
    model = adapted(llama(), **config)
    model.train()
    with online_selection(model, reference=text) as selection:
        for batch in token_batches():
            model(**batch).loss.backward()
    assert selection.report.reference_samples == 8
    assert_same_selection(model, offline(adapted(llama(), **config), token_batches(), reference=text))


# The loop ----------------------------------------------------------------------------------------


def test_an_optimizer_that_was_made_before_trains_the_values_after_the_given_steps():
    batches = token_batches() * 3
    model = adapted(llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = logits(llama(), batches[0])
    model.train()
    with online_selection(model, steps=3) as selection:
        for number, batch in enumerate(batches):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert (selection.report is None) == (number < 3)
            if number == 2:
                torch.testing.assert_close(logits(model, batches[0]), start)  # nothing has learned yet
                model.train()
    assert selection.report.samples == 8 and hooks(model) == 0
    expected = offline(adapted(llama()), batches[:3])
    assert_same_selection(model, expected)
    optimizer = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=1e-2)
    expected.train()
    for batch in batches[3:]:
        expected(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, values in delta(model).items():
        torch.testing.assert_close(values, delta(expected)[name], rtol=1e-3, atol=1e-5, msg=name)


def test_models_with_injected_layers_are_measured():
    model = llama()
    model.add_adapter(FGGMConfig(target_modules=["q_proj", "v_proj"]))
    measure(model, token_batches())
    assert_same_selection(model, offline(adapted(llama(), target_modules=["q_proj", "v_proj"]), token_batches()))


def test_what_else_trains_is_trained_meanwhile():
    model = adapted(llama(), modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    model.train()
    with online_selection(model):
        for batch in token_batches():
            model(**batch).loss.backward()
            optimizer.step()
    assert not torch.equal(head, before)


def test_evaluation_and_forwards_without_backward_count_for_nothing():
    model, batches = adapted(llama()), token_batches()
    model.train()
    with online_selection(model) as selection:
        for batch in batches:
            model(**batches[0])  # looked at, and dropped
            loss = model(**batch).loss
            with torch.no_grad():
                model(**batches[1])
            logits(model, batches[1])
            model.train()
            loss.backward()
    assert selection.report.samples == 8
    assert_same_selection(model, offline(adapted(llama()), batches))


def test_dropout_is_on_as_it_is_in_training():
    build = lambda: adapted(llama(attention_dropout=0.5))  # noqa: E731
    model, expected = build(), offline(build(), token_batches())
    measure(model, token_batches())
    name = next(iter(scores(model)))
    assert not torch.allclose(scores(model)[name][0], scores(expected)[name][0], rtol=1e-2)


def test_an_exception_leaves_the_model_as_it_was():
    model = adapted(llama())
    before = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    model.train()
    with pytest.raises(OSError, match="broke"), online_selection(model) as selection:
        model(**token_batches()[0]).loss.backward()
        raise OSError("the loop broke")
    assert before == [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    assert hooks(model) == 0 and selection.report is None and not selection.is_open
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(AdapterNotSelectedError):
        model(**token_batches()[0])
    measure(model, token_batches())
    assert_same_selection(model, offline(adapted(llama()), token_batches()))


def expect(error, match, model, run, **arguments):
    model.train()
    with pytest.raises(error, match=match), online_selection(model, **arguments):
        run(model)
    assert hooks(model) == 0


def test_a_block_without_a_step_is_an_error():
    expect(ValueError, "saw no training step", adapted(llama()), lambda model: None)
    expect(ValueError, "saw no training step", adapted(llama()), lambda model: logits(model, token_batches()[0]))


def test_two_forwards_before_a_backward_are_an_error():
    def run(model):
        (model(**token_batches()[0]).loss + model(**token_batches()[1]).loss).backward()

    expect(RuntimeError, "backward of each forward", adapted(llama()), run)


def test_a_loss_whose_scale_is_not_known_is_an_error():
    batch = token_batches()[0]

    def own_loss(model):
        model(**batch).logits.square().mean().backward()

    def no_labels(model):
        model(input_ids=batch["input_ids"]).logits.square().mean().backward()

    for run in (own_loss, no_labels):
        expect(ValueError, "loss_scale", adapted(llama()), run)


def test_packed_rows_are_refused():
    batch = token_batches(sizes=(2,), padding="right")[0]
    packed = {**batch, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}
    packed.pop("attention_mask")
    expect(ValueError, "packed into one row", adapted(llama()), lambda model: model(**packed).loss.backward())


def test_a_backward_that_failed_is_not_counted_in_silence():
    model = adapted(llama())
    batch = token_batches()[0]

    def run(model):
        def fail(gradient):
            raise OSError("in the middle")

        handle = model.base_model.model.model.layers[0].register_forward_hook(
            lambda module, args, output: output.register_hook(fail) and None
        )
        with pytest.raises(OSError, match="middle"):
            model(**batch).loss.backward()
        handle.remove()
        model(**batch).loss.backward()

    expect(RuntimeError, "did not reach its end", model, run)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"criterion": "random"}, "needs no data"),
        ({"criterion": "output_magnitude"}, "forward passes alone"),
        ({"fisher_labels": "model"}, "the data's own"),
        ({"granularity": "element", "score_memory": 96 * 64 * 8}, "sees each batch once"),
        ({"criterion": "gain_per_harm"}, "reference"),
    ],
)
def test_what_has_no_online_form_is_refused_at_once(config, message):
    expect(ValueError, message, adapted(llama(), **config), lambda model: pytest.fail("it was opened"))


def test_an_adapter_that_has_its_support_is_refused():
    model = offline(adapted(llama()), token_batches())
    expect(ValueError, "has its support already", model, lambda model: None)
    next(iter(fggm_layers(model, "default").values())).fggm_values["default"].data.fill_(1)
    with pytest.raises(AlreadyTrainedError), online_selection(model):
        pass
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps"):
            online_selection(model, steps)


# The trainer -------------------------------------------------------------------------------------


def seen(folder, share, **settings):
    """A trainer after its run, and the batches of its first steps."""
    batches = []

    class Recording(FGGMTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Recording(
        model=adapted(llama()), args=arguments(folder, **settings), train_dataset=examples(), online_selection=share
    )
    trainer.train()
    return trainer, batches


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_measures_in_its_first_steps_and_trains_what_was_found_in_the_others(accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 6}
    trainer, batches = seen(tmp_path, 0.34, **settings)
    report = trainer.selection_report
    assert report.samples == 2 * 4 * accumulation  # two of six steps
    assert_same_selection(trainer.model, offline(adapted(llama()), batches[: 2 * accumulation]))
    values = [values for name, values in delta(trainer.model).items() if name.endswith("values")]
    assert all(tensor.count_nonzero() for tensor in values) and hooks(trainer.model) == 0
    entry = next(entry for entry in trainer.state.log_history if "selection/samples" in entry)
    assert entry["step"] == 2 and entry["selection/samples"] == report.samples
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[:2] == [0, 0] and all(norms[2:])
    frozen = llama()
    with torch.no_grad():
        expected = [float(frozen(**batch).loss) for batch in batches[: 2 * accumulation]]
    if accumulation == 1:
        assert losses(trainer)[:2] == pytest.approx(expected, rel=1e-3)


def test_no_checkpoint_is_written_while_the_trainer_measures(tmp_path):
    seen(tmp_path, 0.5, save_strategy="steps", save_steps=1)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]
    trainer = make_trainer(adapted(llama()), tmp_path, online_selection=0.5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.selection_report is None and trainer.state.global_step == 4


def test_a_trainer_that_fails_while_it_measures_leaves_the_model_as_it_was(tmp_path):
    class Failing(FGGMTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step:
                raise OSError("the worker died")
            return super().training_step(*args, **kwargs)

    trainer = Failing(model=adapted(llama()), args=arguments(tmp_path), train_dataset=examples(), online_selection=0.9)
    with pytest.raises(OSError, match="worker died"):
        trainer.train()
    assert hooks(trainer.model) == 0
    with pytest.raises(AdapterNotSelectedError):
        trainer.model.train()(**token_batches()[0])


@pytest.mark.parametrize("share", [0, 1, -0.1, True, "some"])
def test_a_share_of_the_steps_is_between_none_and_all(share, tmp_path):
    with pytest.raises(ValueError, match="share of the steps"):
        make_trainer(adapted(llama()), tmp_path, online_selection=share)


def test_what_a_trainer_cannot_do_online_is_an_error(tmp_path):
    trainer = make_trainer(adapted(llama()), tmp_path, online_selection=0.5)
    trainer.selection_log_likelihood = class_log_likelihood
    with pytest.raises(ValueError, match="selection_log_likelihood"):
        trainer.train()
    trainer = make_trainer(adapted(llama()), tmp_path, online_selection=0.5, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="leave online_selection out"):
        trainer.train()
    assert hooks(trainer.model) == 0
