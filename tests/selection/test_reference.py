"""References of a selection: general text, the model's own text, earlier tasks, and their combinations."""

from __future__ import annotations

import json

import pytest
import torch
from models import (
    BERT_HEADS,
    adapted,
    bert,
    fggm_layers,
    fisher_scores,
    llama,
    logits,
    quantized,
    t5,
    token_batches,
    trace,
    train,
)
from reference import units
from safetensors.torch import load_file, save_file
from trainers import make_trainer
from transformers import Trainer

from fggm_peft import CRITERIA, FGGMCallback, FGGMConfig, ScoreFileError, TopDensity, select_parameters
from fggm_peft.core.granularity import granularity_from
from fggm_peft.selection import reference as reference_module
from fggm_peft.selection.self_text import written_batches
from fggm_peft.tuner.files.task_scores import SCORES_FILE, history_of, load_record

GENERAL = token_batches(sizes=(4, 3), seed=5)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(reference_module, "WRITTEN_TEXTS", 6)
    monkeypatch.setattr(reference_module, "WRITTEN_LENGTH", 7)


def harm_model(granularity="column", **config):
    return adapted(llama(), granularity, **{"criterion": "gain_per_harm", "density": 0.25, **config})


def supports(model) -> dict[str, torch.Tensor]:
    return {name: layer.fggm_indices["default"] for name, layer in fggm_layers(model, "default").items()}


def assert_chosen(model, new, kept, granularity):
    """Check that the support is the best quarter by ``sqrt(F_new) / (F_ref + 1 %)`` in float64."""
    for name, indices in supports(model).items():
        harm = kept[name].double()
        ratio = new[name].double().sqrt() / (harm + 0.01 * harm.mean())
        expected = ratio.topk(len(indices)).indices.sort().values
        assert (expected == indices).double().mean() > 0.99 or set(expected.tolist()) == set(indices.tolist()), name


def select(model, reference=None, batches=None, **arguments):
    return select_parameters(model, batches or token_batches(), reference=reference, progress=False, **arguments)


def test_a_dataloader_can_be_the_reference(granularity):
    model = harm_model(granularity)
    report = select(model, GENERAL)
    assert (report.samples, report.reference_samples) == (8, 7)
    plain = adapted(llama(), granularity)
    assert_chosen(model, fisher_scores(plain, token_batches()), fisher_scores(plain, GENERAL), granularity)
    assert "and 7 of the reference" in str(report) and report.to_dict()["reference_samples"] == 7
    json.dumps(report.to_dict())


def test_batches_without_labels_use_their_tokens_as_labels():
    plain = [{k: v for k, v in batch.items() if k != "labels"} for batch in GENERAL]
    labelled = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in plain]
    models = harm_model(), harm_model()
    for model, reference in zip(models, (plain, labelled), strict=True):
        select(model, reference)
    assert all(torch.equal(a, b) for a, b in zip(*(supports(m).values() for m in models), strict=True))


def test_num_samples_applies_to_the_reference_too():
    assert select(harm_model(), GENERAL, num_samples=5).reference_samples == 5
    one = {key: value[:1].expand(8, -1) for key, value in token_batches(sizes=(1,))[0].items()}
    report = select(harm_model(), [one] * 64, batches=[one] * 64)
    assert (report.samples, report.reference_samples) == (8, 8) and report.regret == pytest.approx(0, abs=1e-6)


# The model's own text ----------------------------------------------------------------------------


def test_own_text_is_sampled_from_the_model_by_the_seed():
    model = llama().eval()
    first, again, other = (written_batches(model, 3, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    ids = first[0]["input_ids"]
    assert ids.shape[1] == 6 and (ids[:, 0] == model.config.bos_token_id).all()
    # the frequencies of the second token agree with the model's probabilities
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        expected = model(ids[:1, :1]).logits[0, -1].softmax(-1)
    many = torch.cat([batch["input_ids"][:, 1] for batch in written_batches(model, 4000, 2, 0)])
    counts = torch.bincount(many, minlength=len(expected)) / 4000
    assert (counts - expected).abs().max() < 0.03


def test_own_text_is_padded_after_the_end_token():
    model = llama().eval()
    model.generation_config.eos_token_id = list(range(1, 40))
    (batch,) = written_batches(model, 8, 9, 0)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (9 - length)
        ended = [i for i in range(1, length) if 1 <= int(ids[i]) < 40]
        assert ended in ([], [length - 1])
        assert torch.equal(labels == -100, mask == 0)
    assert batch["attention_mask"].sum() < 8 * 9


def test_reference_self_in_the_config_works_without_changing_the_model():
    model = harm_model(reference="self")
    model.train()
    before, output = trace(model), logits(model, token_batches()[0])
    model.train()
    report = select(model)
    assert report.reference_samples == 6
    after = trace(model)
    assert before[0] == after[0] and before[2:] == after[2:]
    assert all(gradient is None for _, gradient in after[1])
    assert torch.equal(logits(model, token_batches()[0]), output)
    texts = written_batches(llama().eval(), 6, 7, 0)
    plain = adapted(llama(), "column")
    assert_chosen(model, fisher_scores(plain, token_batches()), fisher_scores(plain, texts), "column")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_does_not_change_the_own_text(checkpointing):
    model = harm_model(reference="self")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    select(model)
    expected = harm_model(reference="self")
    select(expected)
    assert all(torch.equal(a, b) for a, b in zip(supports(model).values(), supports(expected).values(), strict=True))


def test_reference_self_requires_a_causal_language_model():
    with pytest.raises(ValueError, match="reference='self' requires a causal language model"):
        select(adapted(t5(), criterion="gain_per_harm", reference="self", task_type="SEQ_2_SEQ_LM"))
    classifier = adapted(bert(BERT_HEADS["sequence"]), criterion="gain_per_harm", reference="self")
    batches = [{**b, "labels": torch.zeros(len(b["input_ids"]), dtype=torch.long)} for b in token_batches()]
    with pytest.raises(ValueError, match="not a BertForSequenceClassification"):
        select(classifier, batches=batches)


def test_own_text_fits_the_positions_and_requires_a_valid_start_token():
    model = llama(max_position_embeddings=5)
    assert written_batches(model, 2, 8, seed=0)[0]["input_ids"].shape[1] <= 5
    model.generation_config.bos_token_id = 50
    with pytest.raises(ValueError, match=r"start token .*got 50 for a vocabulary of 50"):
        written_batches(model, 2, 8, seed=0)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("reference", ["self", GENERAL], ids=["self", "text"])
def test_a_reference_does_not_change_a_quantized_base(kind, reference):
    base = quantized(llama(intermediate_size=128), kind)
    model = adapted(base, "column", criterion="gain_per_harm")
    before = trace(model)
    expected = logits(model, token_batches()[0])
    report = select(model, reference)
    assert report.reference_samples and report.parameters
    assert trace(model)[2:] == before[2:]
    assert torch.equal(logits(model, token_batches()[0]), expected)
    train(model, token_batches())


@pytest.mark.parametrize("given", ["config", "attribute", "callback"])
def test_a_trainer_gets_its_reference_from_config_attribute_or_callback(given, tmp_path):
    model = harm_model(reference="self" if given == "config" else None)
    callback = FGGMCallback(reference=GENERAL)
    options = {"trainer_class": Trainer, "callbacks": [callback]} if given == "callback" else {}
    trainer = make_trainer(model, tmp_path, **options)
    if given == "attribute":
        trainer.selection_reference = GENERAL
    trainer.train()
    report = callback.selection_report if given == "callback" else trainer.selection_report
    assert report.reference_samples == (6 if given == "config" else 7)
    if given == "attribute":
        bare = make_trainer(harm_model(), tmp_path)
        with pytest.raises(ValueError, match="selection_reference"):
            bare.train()


# Several references ------------------------------------------------------------------------------


def test_several_references_are_normalized_by_their_mean_and_added(granularity, tmp_path):
    other = token_batches(sizes=(5,), seed=8)
    report = select(adapted(llama(), granularity), batches=other)
    report.save_scores(tmp_path / "task.safetensors")
    model = harm_model(granularity)
    select(model, [GENERAL, str(tmp_path / "task.safetensors")])
    plain = adapted(llama(), granularity)
    layers = fggm_layers(plain, "default")
    entries = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in layers.values())
    kept = dict.fromkeys(layers, 0)
    for source in (GENERAL, other):
        scores = fisher_scores(plain, source)
        mean = sum(float(values.double().sum()) for values in scores.values()) / entries
        for name, values in scores.items():
            if source is other and granularity == "element":  # saved as row sums and column sums
                matrix = values.double().view(layers[name].weight_shape)
                values = (matrix.sum(1, keepdim=True) @ matrix.sum(0, keepdim=True) / matrix.sum()).flatten()
            kept[name] = kept[name] + values.double() / mean
    assert_chosen(model, fisher_scores(plain, token_batches()), kept, granularity)


def test_own_text_is_the_same_for_every_group_of_modules():
    """The text is generated once in the first pass, without dropout and by the seed."""
    chosen = []
    for memory in (None, 2 * 8 * 96 * 64):
        config = {"criterion": "gain_per_harm", "reference": "self", "score_memory": memory}
        model = adapted(llama(attention_dropout=0.5), "element", **config)
        select(model.train())
        chosen.append(supports(model))
    assert all(torch.equal(indices, chosen[1][name]) for name, indices in chosen[0].items())


def test_a_reference_that_can_be_read_only_once_is_rejected_for_several_groups():
    with pytest.raises(ValueError, match="read once"):
        select(harm_model("element", score_memory=2 * 8 * 96 * 64), iter(GENERAL))


def test_several_references_with_data_do_not_support_score_memory():
    with pytest.raises(ValueError, match=r"several references.*score_memory"):
        select(harm_model("element", score_memory=3 * 8 * 96 * 64), [GENERAL, "self"])


def test_a_global_threshold_ranks_the_units_of_all_modules_together():
    model = harm_model(density=None, threshold=TopDensity(0.2, scope="global"))
    select(model, GENERAL)
    plain = adapted(llama(), "column")
    layers = fggm_layers(plain, "default")
    new, kept = fisher_scores(plain, token_batches()), fisher_scores(plain, GENERAL)
    sizes = {name: layer.weight_shape for name, layer in layers.items()}
    mean = sum(v.double().sum() for v in kept.values()) / sum(o * i for o, i in sizes.values())
    rank = {n: (new[n].double() / sizes[n][0]).sqrt() / (kept[n].double() / sizes[n][0] + 0.01 * mean) for n in sizes}
    chosen = supports(model)
    lowest_in = min(float(rank[n][chosen[n].long()].min()) for n in sizes if len(chosen[n]))
    out = [
        rank[n][~torch.isin(torch.arange(sizes[n][1]), chosen[n])].max() for n in sizes if len(chosen[n]) < sizes[n][1]
    ]
    assert lowest_in >= max(map(float, out)) * (1 - 1e-4)


# Earlier tasks -----------------------------------------------------------------------------------

TASKS = [token_batches(sizes=(4, 3), seed=seed) for seed in (11, 12, 13)]


def test_the_history_is_the_sum_of_earlier_tasks_and_needs_no_old_data(granularity):
    """In one process, the model that ``merge_and_unload`` returns carries the history."""
    base = llama()
    scores = []
    for number, batches in enumerate(TASKS):
        model = adapted(base, granularity, criterion="gain_per_harm", density=0.25)
        scores.append(fisher_scores(model, batches))
        if number == 0:
            with pytest.warns(UserWarning, match="the history is empty"):
                select(model, "history", batches)
        else:
            report = select(model, "history", batches)
            assert report.reference_samples == 0
        if number < 2:
            train(model, batches, lr=1e-3)
            base = model.merge_and_unload()
    assert len(base.fggm_history) == len(history_of(base)) == 3
    layers = fggm_layers(model, "default")
    entries = sum(layer.weight_shape[0] * layer.weight_shape[1] for layer in layers.values())
    kept = dict.fromkeys(layers, 0)
    for task in scores[:2]:
        mean = sum(float(v.double().sum()) for v in task.values()) / entries
        for name, values in task.items():
            if granularity == "element":
                matrix = values.double().view(layers[name].weight_shape)
                values = (matrix.sum(1, keepdim=True) @ matrix.sum(0, keepdim=True) / matrix.sum()).flatten()
            kept[name] = kept[name] + values.double() / mean
    assert_chosen(model, scores[2], kept, granularity)


def test_selecting_again_replaces_the_history_of_the_same_adapter():
    model = harm_model(criterion="fisher")
    select(model), select(model)
    assert len(history_of(model.get_base_model())) == 1
    other = adapted(model.unload(), "column")
    select(other, batches=TASKS[1])
    assert len(history_of(other.get_base_model())) == 2


@pytest.mark.parametrize("criterion", ["gain_per_harm", "input_ratio"])
def test_saved_scores_can_be_the_history_in_another_process(criterion, tmp_path):
    base, models = llama(), []
    first = harm_model(criterion=criterion, save_scores=True)
    select(first, GENERAL, TASKS[0])
    first.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / SCORES_FILE).is_file()
    for reference, start in (("history", first.unload()), (["history", str(tmp_path / "first")], base)):
        model = adapted(start, "column", criterion=criterion, reference=reference)
        select(model, batches=TASKS[1])
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(supports(m).values() for m in models), strict=True))
    assert models[1].peft_config["default"].to_dict()["reference"] == ["history", str(tmp_path / "first")]


def test_loaded_scores_equal_the_saved_scores(granularity, tmp_path):
    base = llama()
    base.config._name_or_path = base.name_or_path = "some/model"
    model = adapted(base, granularity)
    report = select(model)
    file = report.save_scores(tmp_path)
    assert file == tmp_path / SCORES_FILE and not list(tmp_path.glob("*.partial"))
    record = load_record(tmp_path)
    assert (record.granularity, record.samples, record.base) == (granularity, 8, "some/model")
    expected = fisher_scores(adapted(llama(), granularity), token_batches())
    for name, layer in fggm_layers(model, "default").items():
        values = record.values("fisher", name, granularity_from(granularity), layer.weight_shape)
        assert values.dtype == torch.float32 and len(values) == units(granularity, layer.weight_shape)
        if granularity != "element":
            assert torch.equal(values, expected[name])
        else:
            matrix = expected[name].view(layer.weight_shape)
            torch.testing.assert_close(values.view_as(matrix).sum(0), matrix.sum(0), rtol=1e-4, atol=1e-9)
            for kind, sums in (("row", matrix.sum(1)), ("column", matrix.sum(0))):
                actual = record.values("fisher", name, granularity_from(kind), layer.weight_shape)
                torch.testing.assert_close(actual, sums, rtol=1e-4, atol=1e-9)
    assert all(tensor.dtype == torch.float32 and tensor.dim() == 1 for tensor in load_file(file).values())


def test_scores_are_not_saved_with_the_adapter_by_default(tmp_path):
    model = adapted(llama())
    select(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / SCORES_FILE).exists()


def test_saving_scores_without_statistics_raises_an_error(tmp_path):
    report = select(adapted(llama(), criterion="random"))
    with pytest.raises(ValueError, match="no statistics that a later task could use"):
        report.save_scores(tmp_path)


def damage(change):
    def write(file):
        tensors = load_file(file)
        metadata = {"format": "fggm_scores 1", "fggm": json.dumps({"granularity": "column", "samples": 8, "base": ""})}
        change(tensors, metadata)
        save_file(tensors, file, metadata)

    return write


Q = "fisher/model.layers.0.self_attn.q_proj"
BAD_FILES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "not safetensors": lambda file: file.write_text("scores"),
    "another format": damage(lambda tensors, metadata: metadata.update(format="x")),
    "no metadata": damage(lambda tensors, metadata: metadata.pop("fggm")),
    "bad granularity": damage(lambda t, m: m.update(fggm='{"granularity": "x", "samples": 1, "base": ""}')),
    "nan": damage(lambda tensors, metadata: tensors[Q].fill_(float("nan"))),
    "negative": damage(lambda tensors, metadata: tensors[Q].fill_(-1)),
    "half precision": damage(lambda tensors, metadata: tensors.update({Q: tensors[Q].half()})),
    "a missing module": damage(lambda tensors, metadata: tensors.pop(Q)),
    "another base": damage(lambda tensors, metadata: tensors.update({Q: torch.ones(65)})),
    "another statistic": damage(lambda t, m: [t.update({k.replace("fisher", "other"): t.pop(k)}) for k in list(t)]),
    "columns missing": damage(lambda t, m: t.update({Q + "/rows": t.pop(Q)})),
    "another granularity": damage(lambda t, m: m.update(fggm='{"granularity": "row", "samples": 8, "base": ""}')),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_invalid_score_file_raises_an_error_and_does_not_change_the_model(name, tmp_path):
    file = select(adapted(llama(), "column")).save_scores(tmp_path)
    BAD_FILES[name](file)
    model = harm_model(reference=str(file))
    with pytest.raises(ScoreFileError):
        select(model)
    assert all(not layer.selected["default"] for layer in fggm_layers(model, "default").values())


def test_a_missing_score_file_raises_an_error_that_says_how_to_write_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_scores"):
        select(harm_model(reference=str(tmp_path)))


# Invalid arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if CRITERIA[name].reference])
def test_a_missing_reference_raises_an_error_that_lists_the_options(criterion):
    model = adapted(llama(), "column", criterion=criterion)
    with pytest.raises(ValueError, match=r"reference='self'.*'history'.*dataloader"):
        select(model)


def test_an_unused_reference_is_rejected():
    with pytest.raises(
        ValueError, match="'fisher' uses no reference; remove it, set harm_decay, or use one of 'gain_per_harm'"
    ):
        FGGMConfig(reference="self")
    with pytest.raises(ValueError, match="uses no reference"):
        select(adapted(llama()), GENERAL)
    with pytest.raises(ValueError, match="reference must be of type"):
        FGGMConfig(criterion="gain_per_harm", reference=[1])


def test_labels_outside_the_classes_of_the_head_raise_an_error():
    batches = token_batches()
    batches[1]["labels"][0, -1] = 50
    with pytest.raises(ValueError, match=r"a label is 50, but the model's head has the classes 0\.\.49"):
        select(adapted(llama()), batches=batches)
