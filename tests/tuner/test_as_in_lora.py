"""Names, compiled bases, state dicts and shared configs: FGGM adapters behave as LoRA adapters do, or raise."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from accelerate import Accelerator
from models import llama, logits, token_batches, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import LlamaForCausalLM

from fggm_peft import AdapterFileError, FGGMConfig, attach_harm_decay, input_covariance, select_parameters
from fggm_peft.deltas import verify
from fggm_peft.tuner.target import find_targets

BATCHES = token_batches()
METHODS = pytest.mark.parametrize("method", ["fggm", "lora"])


def config(method: str = "fggm", **settings):
    settings = {"target_modules": "all-linear", **settings}
    return LoraConfig(**settings) if method == "lora" else FGGMConfig(**{"density": 0.3, **settings})


def adapted(method: str = "fggm", model=None, **settings):
    model = get_peft_model(llama() if model is None else model, config(method, **settings))
    if method == "fggm" and not any(target.is_selected for target in find_targets(model, "default").values()):
        select_parameters(model, BATCHES, progress=False)
    return model


def trained(method: str = "fggm", **settings):
    model = adapted(method, **settings)
    train(model, BATCHES, steps=2)
    return model


def compiled(model=None):
    return torch.compile(llama() if model is None else model, backend="eager")


# Names ------------------------------------------------------------------------------------------

NAMES = ["mlp", "layers", "q_proj", "0", "lm_head", "weight", "base_layer", "fggm_values", "model", "keys", "a.b", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_part_of_a_key_is_rejected_before_anything_changes(name, tmp_path):
    model = trained()
    before, keys = logits(model, BATCHES[0]), set(model.state_dict())
    with pytest.raises(ValueError, match="cannot be named"):
        model.add_adapter(name, config(criterion="random"))
    assert set(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path), BATCHES[0]), before)
    with pytest.raises(ValueError, match="cannot be named"):
        get_peft_model(llama(), config(), adapter_name=name)


@METHODS
@pytest.mark.parametrize("name", ["other", "mlp2", "adapter_q_proj", "task-1"])
def test_other_names_keep_every_tensor_of_both_adapters(name, method, tmp_path):
    model = trained(method)
    model.add_adapter(name, config(method, **({"criterion": "random"} if method == "fggm" else {})))
    model.set_adapter(name)
    train(model, BATCHES, steps=1)
    model.save_pretrained(tmp_path)
    for adapter, folder in (("default", tmp_path), (name, tmp_path / name)):
        model.set_adapter(adapter)
        assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder), BATCHES[0]), logits(model, BATCHES[0]))


# Incomplete files -------------------------------------------------------------------------------

REMOVED = [r"\.mlp\.", r"layers\.1\.", r"q_proj", r"layers\.0\.self_attn\.o_proj"]


@pytest.mark.parametrize("pattern", REMOVED)
def test_a_file_without_some_modules_is_rejected_by_every_reader(pattern, tmp_path):
    trained().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if not re.search(pattern, key)}, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="support_sizes"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(AdapterFileError, match="support_sizes"):
        verify(tmp_path)
    model = llama()
    with pytest.raises((AdapterFileError, RuntimeError)):
        model.load_adapter(str(tmp_path))
        logits(model, BATCHES[0])


# Compiled bases ---------------------------------------------------------------------------------


def with_compiled(part: str):
    base = llama()
    if part == "model":
        return compiled(base)
    if part == "decoder":
        base.model = compiled(base.model)
    elif part == "layer":
        base.model.layers[1] = compiled(base.model.layers[1])
    return base


@pytest.mark.parametrize("part", ["model", "decoder", "layer"])
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "up_proj"]}, {}, {"bias": "all"}], ids=str)
@torch.compiler.set_stance("force_eager")
def test_files_of_plain_and_compiled_bases_are_interchangeable(settings, part, tmp_path):
    for number, (before, after) in enumerate([("nothing", part), (part, "nothing"), (part, part)]):
        model = adapted("fggm", with_compiled(before), **settings)
        train(model, BATCHES, steps=2)
        model.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(with_compiled(after), tmp_path / str(number))
        assert torch.equal(logits(loaded, BATCHES[0]), logits(model, BATCHES[0]))


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: get_peft_model(compiled(), config()),
        lambda: compiled(get_peft_model(llama(), config())),
        lambda: DataParallel(get_peft_model(llama(), config())),
        lambda: Accelerator().prepare(get_peft_model(llama(), config())),
    ],
    ids=["compiled base", "compiled PeftModel", "DataParallel", "accelerate"],
)
def test_wrapped_models_select_the_same_supports(wrap):
    model, expected = wrap(), find_targets(adapted(), "default")
    select_parameters(model, BATCHES, progress=False)
    targets = find_targets(model, "default")
    assert targets.keys() == expected.keys()
    assert all(torch.equal(targets[path].indices, expected[path].indices) for path in targets)


def test_other_entry_points_accept_wrapped_models():
    model = get_peft_model(llama(), config(harm_decay=1.0))
    wrapped = DataParallel(model)
    select_parameters(wrapped, BATCHES, reference=BATCHES, progress=False)
    assert input_covariance(wrapped, BATCHES).inputs.keys() == input_covariance(model, BATCHES).inputs.keys()
    assert attach_harm_decay(wrapped, torch.optim.AdamW(model.parameters())) is not None


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_inside_ddp_cannot_be_resized(process_group, tmp_path):
    trained().save_pretrained(tmp_path)
    model = get_peft_model(llama(), config())
    wrapped = DistributedDataParallel(model)
    for one in (wrapped, model):
        with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
            select_parameters(one, BATCHES, progress=False)
    with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
        model.load_adapter(str(tmp_path), "default")
    with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
        wrapped.load_state_dict(DataParallel(trained()).state_dict())
    ready = DistributedDataParallel(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True))
    train(ready, BATCHES, steps=1)
    ready.module.load_adapter(str(tmp_path), "default")  # the same sizes


# State dicts of whole models --------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("wrap", [lambda m: m, DataParallel], ids=["plain", "DataParallel"])
def test_a_new_adapter_loads_the_state_dict_of_a_model(wrap, method, tmp_path):
    model, new = trained(method), get_peft_model(llama(), config(method))
    torch.save(wrap(model).state_dict(), tmp_path / "state.pt")
    result = wrap(new).load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(new, BATCHES[0]), logits(model, BATCHES[0]))
    assert train(new, BATCHES, steps=2) == train(model, BATCHES, steps=2)


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_a_state_dict_with_empty_supports_loads_and_trains(granularity):
    model = trained(granularity=granularity)
    for target in list(find_targets(model, "default").values())[::2]:
        target.layer.set_support("default", target.indices[:0])
    new = get_peft_model(llama(), config(granularity=granularity))
    new.load_state_dict(model.state_dict())
    assert train(new, BATCHES, steps=2) == train(model, BATCHES, steps=2)


def test_several_adapters_load_from_one_state_dict():
    def build():
        model = get_peft_model(llama(), config())
        model.add_adapter("other", config(granularity="column"))
        return model

    model = build()
    for name in ("default", "other"):
        select_parameters(model, BATCHES, adapter_name=name, progress=False)
    new = build()
    new.load_state_dict(model.state_dict())
    for name in ("default", "other"):
        for path, target in find_targets(new, name).items():
            assert torch.equal(target.indices, find_targets(model, name)[path].indices) and target.is_selected


@pytest.mark.parametrize("change", [lambda i: i + 10_000, lambda i: -i - 1, lambda i: i.flip(0), torch.zeros_like])
def test_invalid_indices_of_a_state_dict_are_rejected(change):
    state = adapted().state_dict()
    key = next(key for key in state if "fggm_indices" in key)
    new = get_peft_model(llama(), config())
    with pytest.raises(AdapterFileError, match="fggm_indices"):
        new.load_state_dict({**state, key: change(state[key])})


@METHODS
def test_a_loop_of_accelerate_resumes_exactly(method, tmp_path):
    def build():
        model = get_peft_model(llama(), config(method))
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def steps(accelerator, model, optimizer):
        model.train()
        losses = []
        for batch in BATCHES:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    loop = build()
    if method == "fggm":
        select_parameters(loop[1], BATCHES, progress=False)
    steps(*loop)
    loop[0].save_state(tmp_path)
    expected = steps(*loop)
    resumed = build()
    resumed[0].load_state(tmp_path)
    assert steps(*resumed) == expected


# Shared configs ---------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("reuse", ["the argument", "the adapter's", "a loaded adapter's"])
def test_a_config_makes_further_adapters_after_a_save(reuse, method, tmp_path):
    random = {"criterion": "random"} if method == "fggm" else {}
    shared = config(method, **random)
    model = get_peft_model(llama(), shared)
    train(model, BATCHES, steps=1)
    if method == "fggm":
        before = copy.deepcopy(shared)
        model.save_pretrained(tmp_path)
        assert shared == before
    model.save_pretrained(tmp_path)
    if reuse == "the adapter's":
        shared = model.peft_config["default"]
    elif reuse == "a loaded adapter's":
        shared = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).peft_config["default"]
    other = get_peft_model(llama(layers=2, hidden_size=32), shared)
    losses = train(other, BATCHES, steps=2)
    assert losses[1] < losses[0] + 1
    other.save_pretrained(tmp_path / "other")
    loaded = PeftModel.from_pretrained(llama(layers=2, hidden_size=32), tmp_path / "other")
    assert torch.equal(logits(loaded, BATCHES[0]), logits(other, BATCHES[0]))
    other.load_adapter(str(tmp_path / "other"), "default")


def test_saving_twice_writes_the_same_config(tmp_path):
    model = trained()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    a, b = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("a", "b"))
    assert a == b and a["support_sizes"]


# Bases in 8 bits --------------------------------------------------------------------------------


def in_eight_bits(dtype: torch.dtype) -> LlamaForCausalLM:
    """Weights stored in 8 bits, which hooks convert for each call."""
    model = llama(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            store = lambda module, *_: module.to(dtype)  # noqa: E731
            store(module)
            module.register_forward_pre_hook(lambda module, _: module.to(torch.bfloat16) and None)
            module.register_forward_hook(lambda module, *_, store=store: store(module) and None)
    return model


@METHODS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
def test_a_float8_base_trains_saves_and_loads(dtype, method, tmp_path):
    model = adapted(method, in_eight_bits(dtype))
    train(model, BATCHES, steps=2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(in_eight_bits(dtype), tmp_path)
    assert torch.equal(logits(loaded, BATCHES[0]), logits(model, BATCHES[0]))
