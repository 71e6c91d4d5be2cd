"""Common ways to load, train, publish and use models work with FGGM."""

from __future__ import annotations

import copy
import itertools
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import adapted, byte_tokenizer, fggm_layers, llama, logits, text_model, token_batches, train
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from reference import KINDS
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from trainers import (
    MixinTrainer,
    arguments,
    assert_same_delta,
    delta,
    evaluation_losses,
    examples,
    losses,
    make_trainer,
)
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, default_data_collator, pipeline

from fggm_peft import FGGMConfig, select_parameters
from fggm_peft.core.criteria import CRITERIA
from fggm_peft.core.granularity import granularity_from
from fggm_peft.training import FGGMCallback, FGGMTrainer

BATCHES = token_batches(sizes=(5, 4, 5), padding="right")

# Offloading -------------------------------------------------------------------------------------

OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def offloaded(tmp_path):
    """Loads the small Llama, with its second block offloaded to disk."""
    llama().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=OFFLOADED, offload_folder=tmp_path / "offloaded"
        )
        assert model.model.layers[1].mlp.up_proj.weight.is_meta
        return model

    return load


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_a_base_offloaded_to_disk_gives_the_results_of_a_base_in_memory(criterion, offloaded, tmp_path):
    granularity = next(name for name in KINDS if CRITERIA[criterion].supports(granularity_from(name)))
    decay = {"harm_decay": 1.0} if CRITERIA[criterion].uses_covariance else {}
    models = [adapted(base, granularity, criterion=criterion, **decay) for base in (llama(), offloaded())]
    reference = BATCHES[:1] if CRITERIA[criterion].reference or decay else None
    for model in models:
        if CRITERIA[criterion].needs_data:
            select_parameters(model, BATCHES, reference=reference, progress=False)
    assert_same_delta(*models)
    expected = train(models[0], BATCHES)
    assert train(models[1], BATCHES) == pytest.approx(expected, rel=1e-5)
    assert_same_delta(*models, rtol=1e-3, atol=1e-4)
    models[1].save_pretrained(tmp_path / "adapter")
    trained = logits(models[1], BATCHES[0])
    in_memory = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(in_memory, BATCHES[0]), trained)
    on_disk = get_peft_model(offloaded(), FGGMConfig.from_pretrained(tmp_path / "adapter"))
    assert not set_peft_model_state_dict(on_disk, load_peft_weights(tmp_path / "adapter")).unexpected_keys
    assert torch.equal(logits(on_disk, BATCHES[0]), trained)


def test_loading_onto_an_offloaded_base_raises_an_error_with_the_alternative(offloaded, tmp_path):
    adapted(llama(), criterion="random").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"get_peft_model\(base, FGGMConfig.from_pretrained\(adapter\)\)"):
        PeftModel.from_pretrained(offloaded(), tmp_path / "adapter")


def test_a_delta_merges_into_an_offloaded_base_and_unmerges_exactly(offloaded):
    model = adapted(offloaded(), criterion="random", init_weights=False)
    trained = logits(model, BATCHES[0])
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, BATCHES[0]), trained)
    model.unmerge_adapter()
    assert torch.equal(logits(model, BATCHES[0]), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, BATCHES[0]), trained)


def test_offloaded_layers_of_every_type_give_the_same_output_and_gradient(example, adapt, granularity):
    base, x = example.layer(), example.x()
    offloaded = add_hook_to_module(copy.deepcopy(base), AlignDevicesHook("cpu", offload=True))
    outputs, gradients = [], []
    if not adapt(copy.deepcopy(base)).base_model.model.layer.reads_inputs:
        with pytest.raises(ValueError, match="layer is offloaded, which FGGM does not support"):
            adapt(offloaded)
        return
    for layer in (base, offloaded):
        model = adapt(layer, granularity=granularity)
        values = model.base_model.model.layer.fggm_values["default"]
        nn.init.normal_(values, generator=torch.Generator().manual_seed(0))
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append(values.grad)
    assert offloaded.weight.is_meta
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


# Compilation ------------------------------------------------------------------------------------


@pytest.fixture
def eager(tmp_path):
    """A trainer that has trained with default settings, as the reference."""
    trainer = make_trainer(adapted(llama()), tmp_path / "eager")
    trainer.train()
    return trainer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_train_like_eager_layers(backend, granularity, adapt):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, losses = torch.randn(5, 9, 7), []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = adapt(nn.Linear(7, 6), zero=True, granularity=granularity)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
        run = torch.compile(model, backend=backend) if compiles else model
        for _ in range(4):
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4) and losses[3] < losses[0]


@torch._dynamo.config.patch(recompile_limit=1)
def test_layers_beyond_the_recompile_limit_train_eagerly(granularity):
    """Elements compile into several graphs for each shape; dynamo may then run forward compiled and backward not."""
    torch._dynamo.reset()
    sizes, x, losses = (8, 9, 10, 11), torch.randn(33, 8), []
    for compiles in (False, True):
        torch.manual_seed(0)
        layers = {f"layer{i}": nn.Linear(i, o) for i, o in itertools.pairwise(sizes)}
        model = adapted(
            nn.Sequential(OrderedDict(layers)),
            granularity,
            target_modules=list(layers),
            init_weights=False,
            criterion="random",
            density=0.5,
        )
        run = torch.compile(model, backend="aot_eager") if compiles else model
        loss = run(x).square().mean()
        loss.backward()
        losses.append([loss.item(), *(float(p.grad.norm()) for p in model.parameters() if p.requires_grad)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_selection_runs_compiled_models_eagerly(granularity):
    """The selection's hooks would recompile every layer, and dynamo compiles one function at most eight times."""
    base, batches = llama(layers=2), token_batches()
    uncompiled = select_parameters(adapted(llama(layers=2), granularity), batches, progress=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    base.compile(backend="eager")
    model = adapted(base, granularity)
    report = select_parameters(model, batches, progress=False)
    assert not torch._dynamo.utils.counters["stats"]
    assert report.parameters == uncompiled.parameters
    if granularity != "element":  # elements compile into several graphs for each layer
        model(**batches[0]).loss.backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


def test_the_trainer_selects_before_it_compiles(tmp_path, eager, monkeypatch):
    torch._dynamo.reset()
    compiled, compile = [], torch.compile

    def spy(model, *args, **kwargs):
        compiled.append(all(layer.selected["default"] for layer in fggm_layers(model, "default").values()))
        return compile(model, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    trainer = make_trainer(
        adapted(llama()), tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=4
    )
    trainer.train()
    assert compiled == [True]
    assert losses(trainer) == pytest.approx(losses(eager), rel=1e-4)
    assert_same_delta(trainer.model, eager.model, rtol=1e-2, atol=1e-3)


# Memory and precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_support_nor_losses(use_reentrant, tmp_path, eager):
    model = adapted(llama().eval())  # from_pretrained returns a model in eval mode
    layer, calls = model.base_model.model.model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda *_: calls.append(layer.selected["default"]))
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = make_trainer(model, tmp_path, **checkpointing)
    trainer.train()
    batches, probes = 24 // 4, 4  # the first batch, its first and last sample, and without its last position
    assert calls.count(False) == probes + 2 * batches, "the selection pass does not checkpoint"
    assert calls.count(True) == 2 * 4
    assert losses(trainer) == pytest.approx(losses(eager), rel=1e-5)
    assert_same_delta(model, eager.model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_training_selects_in_bf16_and_keeps_values_in_float32(dtype, tmp_path, monkeypatch):
    model = adapted(llama(dtype))
    precisions, selecting = set(), []
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda m, args, output: precisions.add((bool(selecting), output.dtype)))

    def spy(*args, **kwargs):
        selecting.append(True)
        report = select_parameters(*args, **kwargs)
        selecting.clear()
        return report

    monkeypatch.setattr("fggm_peft.training.trainer.select_parameters", spy)
    trainer = make_trainer(model, tmp_path, bf16=True, max_steps=12, learning_rate=3e-2)
    trainer.train()
    assert precisions == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(tensor.dtype == torch.float32 for name, tensor in delta(model).items() if name.endswith("values"))
    assert all(torch.isfinite(torch.tensor(losses(trainer))))
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])


# Publishing -------------------------------------------------------------------------------------


def test_push_to_hub_uploads_a_loadable_adapter(hub, tmp_path):
    settings = {"push_to_hub": True, "hub_model_id": "delta", "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(adapted(llama()), tmp_path / "out", **settings)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("me/delta")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"}
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "FGGM" and config["selection"]["samples"] == 24
    card = files["README.md"].decode()
    assert "library_name: peft" in card and "import fggm_peft" in card and "Training hyperparameters" in card
    fresh = PeftModel.from_pretrained(llama(), "me/delta")
    assert torch.equal(logits(fresh, BATCHES[0]), logits(trainer.model, BATCHES[0]))


# Evaluation during training ---------------------------------------------------------------------


def overfitting(folder: Path, **settings) -> Trainer:
    """A trainer whose evaluation loss increases after a few steps."""
    return make_trainer(
        adapted(llama()),
        folder,
        train_dataset=examples(4),
        eval_dataset=examples(8, seed=1),
        max_steps=8,
        learning_rate=3e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        **settings,
    )


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = overfitting(tmp_path)
    trainer.train()
    eval_losses = evaluation_losses(trainer)
    best = eval_losses.index(min(eval_losses)) + 1
    assert best < 8, eval_losses
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    layers = fggm_layers(trainer.model, "default")
    assert len(saved) == 2 * len(layers)
    for name, layer in layers.items():
        assert torch.equal(layer.fggm_values["default"], saved[f"base_model.model.{name}.fggm_values"])
        assert torch.equal(layer.fggm_indices["default"], saved[f"base_model.model.{name}.fggm_indices"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(eval_losses), rel=1e-6)


def test_early_stopping_stops_when_the_evaluation_loss_increases(tmp_path):
    trainer = overfitting(tmp_path, callbacks=[EarlyStoppingCallback(early_stopping_patience=1)])
    trainer.train()
    eval_losses = evaluation_losses(trainer)
    assert trainer.state.global_step == len(eval_losses) < 8
    assert eval_losses[-1] > min(eval_losses)


# Generation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_gives_the_tokens_of_the_merged_model(cache, granularity):
    model = adapted(llama(max_position_embeddings=64), granularity, criterion="random", init_weights=False).eval()
    base = llama(max_position_embeddings=64).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    prompt = {key: BATCHES[0][key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**prompt, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(**prompt, **options), base.generate(**prompt, **options))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(tokens, merged.generate(**prompt, **options))
    assert not torch.equal(tokens, base.generate(**prompt, **options))


def test_the_text_generation_pipeline_accepts_an_adapted_model():
    model = adapted(text_model(), criterion="random", init_weights=False)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = []
    for one in (model, copy.deepcopy(model).merge_and_unload(), text_model()):
        generate = pipeline("text-generation", model=one, tokenizer=byte_tokenizer(), device="cpu")
        texts.append(generate("two plus one is", **options)[0]["generated_text"])
    assert texts[0] == texts[1] != texts[2]


# Trainers ---------------------------------------------------------------------------------------


def test_the_callback_and_the_mixin_give_the_same_result(tmp_path):
    mixin = make_trainer(adapted(llama()), tmp_path, MixinTrainer)
    mixin.train()
    callback = FGGMCallback()
    trainer = make_trainer(adapted(llama()), tmp_path, Trainer, callbacks=[callback])
    trainer.train()
    assert callback.selection_report.samples == mixin.selection_report.samples == 24
    assert losses(trainer) == losses(mixin)
    assert_same_delta(trainer.model, mixin.model)
    logged = [entry for entry in trainer.state.log_history if "selection/samples" in entry]
    assert len(logged) == 1


def test_the_callback_refuses_several_processes(tmp_path):
    model = adapted(llama())
    callback = FGGMCallback()
    args = arguments(tmp_path)
    args.__dict__["_n_gpu"] = 2
    with pytest.raises(ValueError, match="FGGMTrainerMixin"):
        callback.on_train_begin(args, None, None, model=model, train_dataloader=[])
    assert not any(layer.selected["default"] for layer in fggm_layers(model, "default").values())


@pytest.mark.parametrize("trainer_class", [FGGMTrainer, Trainer])
def test_an_optimizer_created_before_the_selection_trains_the_selected_values(trainer_class, tmp_path, eager):
    model = adapted(llama())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=eager.args.weight_decay
    )
    callbacks = [FGGMCallback()] if trainer_class is Trainer else None
    trainer = make_trainer(model, tmp_path, trainer_class, optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train()
    assert all(tensor.count_nonzero() for name, tensor in delta(model).items() if name.endswith("values"))
    assert losses(trainer) == pytest.approx(losses(eager), rel=1e-5)


def test_a_model_from_model_init_is_selected_and_trained(tmp_path, eager):
    def fresh():
        with torch.random.fork_rng():  # the trainer draws the order of the data afterwards
            return adapted(llama())

    trainer = make_trainer(None, tmp_path, model_init=fresh)
    trainer.train()
    assert_same_delta(trainer.model, eager.model)
    trainer.train()  # a second run starts from a new model, as in a hyperparameter search
    assert_same_delta(trainer.model, eager.model)


def test_a_dataset_without_labels_raises_an_error(tmp_path):
    model = adapted(llama())
    rows = [{"input_ids": row["input_ids"]} for row in examples()]
    with pytest.raises(ValueError, match="labels"):
        make_trainer(model, tmp_path, train_dataset=rows).train()
    assert not any(layer.selected["default"] for layer in fggm_layers(model, "default").values())


@pytest.mark.parametrize("build", [llama, lambda: get_lora(llama())], ids=["no adapter", "LoRA"])
def test_a_model_without_an_fggm_adapter_raises_an_error_that_names_get_peft_model(build, tmp_path):
    with pytest.raises(ValueError, match=r"no active FGGM adapter.*get_peft_model"):
        make_trainer(build(), tmp_path).train()


def get_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_selecting_before_training_equals_selecting_in_the_trainer(tmp_path, eager):
    model = adapted(llama())
    select_parameters(model, DataLoader(examples(), batch_size=4, collate_fn=default_data_collator), progress=False)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert trainer.selection_report is None
    assert_same_delta(model, eager.model)
