"""PEFT features that no other test module covers work with FGGM as they do with LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from models import bert, fggm_layers, llama, logits, token_batches, train
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from reference import KINDS, TOLERANCE, relative_error
from torch import nn
from transformers import BertForSequenceClassification

from fggm_peft import FGGMConfig, select_parameters

BATCHES = token_batches()


def random(granularity: str = "row", **config) -> FGGMConfig:
    options = {"criterion": "random", "density": 0.2, "init_weights": False} | config
    return FGGMConfig(granularity=granularity, **options)


def names_of(model) -> list[str]:
    return list(fggm_layers(model, "default"))


# Targets ----------------------------------------------------------------------------------------


def test_a_list_a_pattern_and_exclusions_choose_the_target_modules():
    all_linear = names_of(get_peft_model(llama(), random()))
    assert len(all_linear) == 14 and "lm_head" not in all_linear
    assert names_of(get_peft_model(llama(), random(target_modules=r".*layers\.1\..*_proj"))) == all_linear[7:]
    assert names_of(get_peft_model(llama(), random(target_modules=["q_proj", "layers.1.mlp.up_proj"]))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    rest = names_of(get_peft_model(llama(), random(target_modules="all-linear", exclude_modules=r".*mlp.*")))
    assert rest == [name for name in all_linear if "mlp" not in name]
    some = {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}
    assert names_of(get_peft_model(llama(), random(**some))) == ["model.layers.1.self_attn.q_proj"]


def test_tied_embeddings_warn_as_in_peft_and_stay_tied_after_merging(granularity):
    with pytest.warns(UserWarning, match="tied"):
        model = get_peft_model(llama(tie_word_embeddings=True), random(granularity, target_modules=["embed_tokens"]))
    delta = fggm_layers(model, "default")["model.embed_tokens"].get_delta_weight("default")
    expected = llama(tie_word_embeddings=True)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.lm_head.weight, expected.lm_head.weight + delta)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


# Parameters trained in addition to the delta ------------------------------------------------------


@pytest.mark.parametrize("tokens", [[3, 7], {"embed_tokens": [3, 7]}], ids=["list", "dict"])
def test_trainable_tokens_train_save_and_merge_together_with_the_delta(tokens, granularity, tmp_path):
    model = get_peft_model(llama(), random(granularity, trainable_token_indices=tokens))
    before = llama().model.embed_tokens.weight
    train(model, BATCHES, steps=3, lr=1e-1)
    model.save_pretrained(tmp_path)
    expected = logits(model, BATCHES[0])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), BATCHES[0]), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, BATCHES[0]), expected, rtol=1e-4, atol=1e-5)
    changed = (merged.model.embed_tokens.weight != before).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 7]


def test_each_adapter_fully_trains_its_own_copy_of_a_new_head():
    model = get_peft_model(bert(BertForSequenceClassification), random(task_type="SEQ_CLS"))
    head = model.base_model.model.classifier
    assert model.peft_config["default"].modules_to_save and head.modules_to_save["default"].weight.requires_grad
    model.add_adapter("second", random(task_type="SEQ_CLS", seed=1))
    model.set_adapter("second")
    assert head.modules_to_save["second"].weight.requires_grad
    assert not head.modules_to_save["default"].weight.requires_grad


# Adapters ---------------------------------------------------------------------------------------


def test_pefts_status_describes_every_layer_and_the_model():
    model = get_peft_model(llama(), random())
    model.add_adapter("second", random("element"))
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "FGGMModel")
    assert status.num_adapter_layers == 14 and status.active_adapters == ["default"] and status.enabled
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    assert status.available_adapters == ["default", "second"] and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "second": False}
    model.merge_adapter()
    layers = model.get_layer_status()
    assert len(layers) == 14 and all(layer.merged_adapters == ["default"] for layer in layers)
    assert set(layers[0].devices) == {"default", "second"}


def test_set_requires_grad_switches_gradients_by_adapter_name(granularity, capsys):
    model = get_peft_model(llama(), random(granularity))
    model.add_adapter("second", random(granularity, seed=1))
    model.set_requires_grad("default", requires_grad=False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad(["default", "second"])
    both = sum(len(layer.fggm_values) for layer in fggm_layers(model, "default").values())
    assert sum(p.requires_grad for p in model.parameters()) == both == 28
    model.print_trainable_parameters()
    assert "trainable params:" in capsys.readouterr().out


def test_deleting_an_adapter_removes_its_state_and_keeps_the_other_adapters(granularity):
    model = get_peft_model(llama(), random(granularity))
    expected = logits(model, BATCHES[0])
    model.add_adapter("second", random(granularity, seed=1))
    model.set_adapter("second")
    model.delete_adapter("second")
    assert not any("second" in key for key in model.state_dict())
    for layer in fggm_layers(model, "default").values():
        states = [vars(layer)[name] for name in layer.other_param_names if name in vars(layer)]
        assert not any("second" in state for state in states)
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, BATCHES[0]), expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_values_are_float32_unless_autocast_adapter_dtype_is_off(autocast, granularity, tmp_path):
    model = get_peft_model(llama(torch.bfloat16), random(granularity), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    assert {layer.fggm_values["default"].dtype for layer in fggm_layers(model, "default").values()} == {expected}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
    assert {layer.fggm_values["default"].dtype for layer in fggm_layers(loaded, "default").values()} == {expected}
    assert torch.equal(logits(loaded, BATCHES[0]), logits(model, BATCHES[0]))


def test_an_adapter_on_the_meta_device_loads_from_a_state_dict(granularity, tmp_path):
    source = get_peft_model(llama(), random(granularity))
    source.save_pretrained(tmp_path)
    model = get_peft_model(llama(), FGGMConfig(), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in model.parameters() if p.requires_grad)
    model.load_adapter(tmp_path, "task", low_cpu_mem_usage=True)
    model.set_adapter("task")
    assert torch.equal(logits(model, BATCHES[0]), logits(source, BATCHES[0]))


def test_an_injected_adapter_can_be_selected_and_trained(granularity):
    model = inject_adapter_in_model(FGGMConfig(granularity=granularity, density=0.1), llama())
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]
    state = get_peft_model_state_dict(model)
    assert len({key.rpartition(".fggm_")[0] for key in state}) == 14 and all("fggm_" in key for key in state)


# Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_kinds_of_gradient_checkpointing_give_the_same_gradients(use_reentrant, granularity):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(llama(), random(granularity)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**BATCHES[0]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_model_prepared_for_kbit_training_trains(granularity):
    model = get_peft_model(prepare_model_for_kbit_training(llama(torch.bfloat16)), random(granularity))
    losses = train(model, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]


# Compilation and export --------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [3, 40])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "element"])
def test_forward_and_backward_of_rows_and_columns_compile_into_one_graph(kind, positions):
    """Elements are excluded: the shapes of their chunks depend on data, so they compile into several graphs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), random(kind, target_modules=["0", "2"])
    )
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(positions, 16)
    values = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), values)
    for actual, reference in zip(torch.autograd.grad(compiled(x).square().sum(), values), expected, strict=True):
        torch.testing.assert_close(actual, reference)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "element"])
def test_other_sequence_lengths_do_not_recompile_a_model(kind):
    """In eager mode, the form of a layer's product depends on the length, with a different limit for each layer."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    model = get_peft_model(model, random(kind, target_modules=["0", "2"], density_pattern={"2": 0.1}))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for positions in (3, 9, 20, 31, 60, 200):
        x = torch.randn(positions, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


@pytest.mark.parametrize("strict", [True, False])
def test_an_adapted_layer_exports_to_plain_operators(strict, example, granularity, adapt):
    model, x = adapt(example.layer(), granularity=granularity).eval(), example.x()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


# Hooks on the base layer, and other tuners -----------------------------------------------------------


def test_every_type_of_hook_on_the_base_layer_runs_in_every_call(example, granularity, adapt):
    base, x, seen = example.layer(), example.x(), []
    model = adapt(copy.deepcopy(base), granularity=granularity)
    layer = model.base_model.model.layer
    plain = model(x)
    hooks = {
        "before": lambda: layer.base_layer.register_forward_pre_hook(lambda m, args: seen.append("before")),
        "before, keywords": lambda: layer.base_layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append("before, keywords"), with_kwargs=True
        ),
        "after": lambda: layer.base_layer.register_forward_hook(lambda m, args, y: seen.append("after")),
        "backward": lambda: layer.base_layer.register_full_backward_hook(lambda m, gx, g: seen.append("backward")),
        "before backward": lambda: layer.base_layer.register_full_backward_pre_hook(
            lambda m, g: seen.append("before backward")
        ),
    }
    x = x.requires_grad_() if x.is_floating_point() else x
    for name, register in hooks.items():
        if "backward" in name and not x.is_floating_point():
            continue  # a frozen embedding has no backward pass
        handle = register()
        y = model(x)
        y.sum().backward()
        handle.remove()
        assert seen == [name]
        assert relative_error(y, plain) < TOLERANCE[torch.float32]
        seen.clear()


def test_a_hook_on_the_base_layer_can_change_its_input(granularity, adapt):
    model, x = adapt(nn.Linear(7, 5), granularity=granularity), torch.randn(4, 7)
    layer = model.base_model.model.layer
    added = model(x) - layer.base_layer(x)
    layer.base_layer.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    torch.testing.assert_close(model(x), layer.base_layer(x) + added, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("outer", ["fggm", "lora"])
def test_fggm_and_lora_deltas_on_one_layer_add_up_and_train_together(outer, granularity):
    """One adapter wraps the other, because ``PeftMixedModel`` accepts only PEFT's own methods."""
    configs = {
        "lora": LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "fggm": random(granularity),
    }
    configs["fggm"].target_modules = {"q_proj", "up_proj"}
    inner = "lora" if outer == "fggm" else "fggm"
    base = llama()
    weight = base.model.layers[0].mlp.up_proj.weight
    x = torch.randn(5, 64)
    expected = x @ weight.detach().T
    inject_adapter_in_model(configs[inner], base, inner)
    model = get_peft_model(base, configs[outer])
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    for part, name in ((layer, "default"), (layer.base_layer, inner)):
        expected = expected + x @ part.get_delta_weight(name).detach().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    for parameter in [*layer.parameters()]:
        if parameter is not weight:
            parameter.requires_grad_()
    model.eval()(**BATCHES[0]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters() if p.requires_grad)
    assert weight.grad is None
