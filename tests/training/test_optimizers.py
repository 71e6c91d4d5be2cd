"""The training dtype of values, and optimizers with 8-bit states or stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from models import adapted, fggm_layers, llama, quantized, text_model, token_batches, train
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from transformers import TrainingArguments

from fggm_peft import FGGMConfig, FGGMTrainer, estimate, select_parameters
from fggm_peft.training.trl import restore_float32_

BASES = {
    "float32": llama,
    "bfloat16": lambda: llama(torch.bfloat16),
    "nf4": lambda: quantized(llama(), "nf4"),
}


def value_dtypes(model) -> set[torch.dtype]:
    return {layer.fggm_values["default"].dtype for layer in fggm_layers(model, "default").values()}


def trained_values(model) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def eager():
    """Disable compilation: torchao compiles a kernel for every shape, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


# The dtype of the values --------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", list(BASES))
def test_training_dtype_sets_the_dtype_of_values_and_gradients(base, dtype, autocast, granularity):
    config = FGGMConfig(granularity=granularity, density=0.3, training_dtype=dtype)
    model = get_peft_model(BASES[base](), config, autocast_adapter_dtype=autocast)
    optimizer = torch.optim.AdamW(trained_values(model), lr=1e-2)
    select_parameters(model, token_batches(), progress=False)
    batch = token_batches()[0]
    losses = []
    for _ in range(4):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        assert {p.grad.dtype for p in trained_values(model)} == {getattr(torch, dtype)}
        optimizer.step()
        optimizer.zero_grad()
    assert value_dtypes(model) == {getattr(torch, dtype)}
    assert losses[-1] < losses[0]


def test_training_dtype_applies_to_injected_adapters():
    options = {"criterion": "random", "training_dtype": "bfloat16"}
    model = get_peft_model(llama(), FGGMConfig(**options))
    assert value_dtypes(model) == {torch.bfloat16}
    assert value_dtypes(inject_adapter_in_model(FGGMConfig(**options), llama())) == {torch.bfloat16}


def test_loaded_bfloat16_values_stay_bfloat16_and_train(tmp_path, granularity):
    model = adapted(llama(), granularity, criterion="random", density=0.2, training_dtype="bfloat16")
    train(model, token_batches())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert value_dtypes(loaded) == {torch.bfloat16}
    for ours, theirs in zip(trained_values(model), trained_values(loaded), strict=True):
        assert torch.equal(ours, theirs)
    train(loaded, token_batches())


def test_the_estimate_halves_gradients_and_states_for_bfloat16():
    size = {"batch_size": 2, "sequence_length": 8}
    wide, narrow = (estimate(llama(), FGGMConfig(training_dtype=dtype), **size) for dtype in ("float32", "bfloat16"))
    assert narrow.gradient_bytes == 2 * narrow.trainable_values == wide.gradient_bytes / 2
    assert narrow.optimizer_bytes == 4 * narrow.trainable_values + 4 * 14


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_trainer_restores_float32_values_unless_bfloat16_is_configured(dtype, expected):
    model = get_peft_model(quantized(llama(), "nf4"), FGGMConfig(criterion="random", training_dtype=dtype))
    for values in trained_values(model):
        values.data = values.data.to(torch.bfloat16)  # as TRL does
    restore_float32_(model)
    assert value_dtypes(model) == {expected}


def test_another_dtype_is_rejected():
    with pytest.raises(ValueError, match=r"training_dtype must be .*float16"):
        FGGMConfig(training_dtype="float16")


def test_bfloat16_stops_adding_steps_to_a_value_of_a_few_hundred_steps():
    """Rounding to nearest, as documented on the page on training and in ``restore_float32_``."""
    for step in (1e-5, 3e-4, 1e-3):
        value = torch.zeros(1, dtype=torch.bfloat16)
        for _ in range(1000):
            value += step
        assert 0.25 < float(value) / (1000 * step) < 0.52


# bitsandbytes' 8-bit Adam -------------------------------------------------------------------------


def wide_model(**config):
    """A model with modules of at least 4096 values and modules of fewer values."""
    return adapted(llama(hidden_size=128, intermediate_size=256), density=0.3, **config)


def eight_bit_against_adamw(device: str, **config) -> None:
    """Compare steps of both optimizers, which are created before the selection sets the sizes of the parameters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in token_batches()]
    moved, sizes = [], set()
    for make in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
        model = wide_model(**config).to(device)
        optimizer = make(trained_values(model), lr=1e-3)
        select_parameters(model, batches, progress=False)
        for step in range(6):
            model(**batches[step % 3]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(torch.cat([p.detach().float().flatten() for p in trained_values(model)]))
        if make is not torch.optim.AdamW:
            for values in trained_values(model):
                state = optimizer.state[values]
                assert state["state1"].shape == values.shape
                assert (state["state1"].dtype == torch.uint8) == (values.numel() >= 4096)
                sizes.add(values.numel() >= 4096)
    assert sizes == {True, False}
    assert torch.cosine_similarity(*moved, dim=0) > 0.97
    assert 0.9 < moved[1].norm() / moved[0].norm() < 1.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_8_bit_adam_steps_like_adamw_with_8_bit_states_for_large_values(dtype):
    eight_bit_against_adamw("cpu", training_dtype=dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_8_bit_adam_steps_like_adamw_on_a_gpu(dtype):
    eight_bit_against_adamw("cuda", training_dtype=dtype)


def test_a_selection_after_a_step_requires_a_new_optimizer():
    """The optimizer's states have the old sizes, as with AdamW; bitsandbytes raises its own error."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for make in (torch.optim.AdamW, bitsandbytes.optim.AdamW8bit):
        model = wide_model(criterion="random")
        optimizer = make(trained_values(model), lr=1e-3)
        model(**token_batches()[0]).loss.backward()
        optimizer.step()
        for layer in fggm_layers(model, "default").values():
            layer.set_support("default", torch.arange(2))
        model(**token_batches()[0]).loss.backward()
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()


def test_the_trainer_accepts_8_bit_adam_by_name(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    trainer = trainer_with(tmp_path, "adamw_bnb_8bit")
    assert isinstance(trainer.optimizer.optimizer, bitsandbytes.optim.AdamW)
    assert any(state["state1"].dtype == torch.uint8 for state in trainer.optimizer.optimizer.state.values())


def trainer_with(folder, optimizer: str, options: str | None = None, **config) -> FGGMTrainer:
    samples = [{key: value[0] for key, value in batch.items()} for batch in token_batches(sizes=(1,)) * 8]
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim=optimizer,
        optim_args=options,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    base = text_model(hidden_size=128, intermediate_size=256)
    model = get_peft_model(base, FGGMConfig(density=0.3, num_samples=8, **config))
    trainer = FGGMTrainer(model, arguments, train_dataset=samples)
    trainer.train()
    assert any(values.any() for values in trained_values(model))
    return trainer


# torchao's optimizers, stochastic rounding --------------------------------------------------------


def movement_kept(optimizer: type, stochastic: bool) -> float:
    """Share of the distance that remains after 1000 equal steps of 1e-3 from zero."""
    torch.manual_seed(0)
    values = torch.nn.Parameter(torch.zeros(16, 512, dtype=torch.bfloat16))
    stepper = optimizer([values], lr=1e-3, weight_decay=0.0, bf16_stochastic_round=stochastic)
    for _ in range(1000):
        values.grad = torch.ones_like(values)
        stepper.step()
    return float(values.detach().float().mean()) / -1.0


def test_stochastic_rounding_keeps_the_steps_that_rounding_to_nearest_loses(eager):
    optim = pytest.importorskip("torchao.optim")
    assert movement_kept(optim.AdamW8bit, stochastic=False) < 0.55
    assert movement_kept(optim.AdamW8bit, stochastic=True) == pytest.approx(1, abs=0.01)
    # bfloat16 second moments cannot grow by a thousandth of their value, so steps are too large
    assert movement_kept(optim._AdamW, stochastic=True) == pytest.approx(1.23, abs=0.02)


def test_torchaos_optimizer_can_be_created_before_the_selection(eager):
    optim = pytest.importorskip("torchao.optim")
    model = wide_model(training_dtype="bfloat16")
    optimizer = optim.AdamW8bit(trained_values(model), lr=1e-3, bf16_stochastic_round=True)
    select_parameters(model, token_batches(), progress=False)
    for _ in range(2):
        model(**token_batches()[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for values in trained_values(model):
        eight_bits = isinstance(optimizer.state[values]["exp_avg"], optim.subclass_8bit.OptimState8bit)
        assert eight_bits == (values.numel() >= 4096 and values.numel() % 256 == 0)
        assert values.dtype == torch.bfloat16 and values.any()


def test_the_trainer_accepts_torchaos_optimizer_by_name(tmp_path, eager):
    optim = pytest.importorskip("torchao.optim")
    trainer = trainer_with(tmp_path, "adamw_torch_8bit", "bf16_stochastic_round=True", training_dtype="bfloat16")
    assert isinstance(trainer.optimizer.optimizer, optim.AdamW8bit)
    assert trainer.optimizer.optimizer.bf16_stochastic_round
    assert value_dtypes(trainer.model) == {torch.bfloat16}
