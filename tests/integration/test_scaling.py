"""The formulas of docs/scaling.md agree with the memory and operations of small models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import llama, quantized
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from fggm_peft import FGGMConfig, estimate, select_parameters

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import scaling
from suite.measurements import Step
from suite.methods import targeted_values

MIB = 2**20
SIZES = [(128, 2, 8, 64), (256, 2, 2, 160), (192, 3, 4, 96)]
"""(hidden, layers, batch size, length)"""


def model_of(hidden: int, layers: int, dtype: torch.dtype = torch.float32, checkpointing: bool = False):
    model = common.llama(hidden, layers, dtype, vocab=512).requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step_peak(model, size: int, length: int) -> float:
    """Measured peak memory of the second step, in MiB."""
    step = Step(model, common.batches(1, size, length, 512)[0])
    step()
    return common.peak_mib(step)


def unpadded(size: int, length: int) -> dict[str, torch.Tensor]:
    return common.batches(1, size, length, 512)[0]


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_the_selection_pass_allocates_what_the_dry_run_predicts(case, checkpointing, granularity):
    hidden, layers, size, length = case
    config = FGGMConfig(granularity=granularity, density=0.1, num_samples=size)
    arguments = {"batch_size": size, "sequence_length": length, "checkpointing": checkpointing}
    estimated = estimate(model_of(hidden, layers), config, **arguments)
    model = get_peft_model(model_of(hidden, layers, checkpointing=checkpointing), config)
    data = common.batches(1, size, length, 512)
    peak = common.peak_mib(lambda: select_parameters(model, data, progress=False))
    measured = estimated.base_bytes + peak * MIB
    assert measured <= 1.1 * estimated.selection_bytes
    if granularity != "row" or checkpointing:  # rows allocate less than the inputs that the estimate counts
        assert estimated.selection_bytes == pytest.approx(measured, rel=0.1)
    assert estimated.score_bytes == scaling.score_bytes(model_of(hidden, layers), granularity)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_lora_and_full_fine_tuning_allocate_what_the_formulas_predict(case):
    hidden, layers, size, length = case
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    lora = get_peft_model(model_of(hidden, layers), config)
    full = model_of(hidden, layers).requires_grad_(True)
    for model in (lora, full):
        counted = scaling.step_memory(model, unpadded, size, length, False)
        measured = step_peak(model, size, length) * MIB
        assert counted.activations + counted.gradients == pytest.approx(measured, rel=0.1)
    paper = scaling.on_paper(lora.get_base_model().config, torch.float32)
    assert set(scaling.linears(paper)) == set(scaling.linears(model_of(hidden, layers)))


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("case", SIZES[:2], ids=str)
def test_a_quantized_base_has_its_own_size_and_a_dense_models_activations(case, kind):
    hidden, layers, size, length = case
    config = FGGMConfig(density=0.1, criterion="random")
    precision = {"nf4 double": "4-bit", "int8": "8-bit"}[kind]
    base = quantized(model_of(hidden, layers), kind)
    estimated = estimate(base, config, batch_size=size, sequence_length=length)
    assert scaling.base_bytes(model_of(hidden, layers), precision) == pytest.approx(estimated.base_bytes, rel=0.02)
    dense = estimate(model_of(hidden, layers), config, batch_size=size, sequence_length=length)
    peak = step_peak(get_peft_model(base, config), size, length) * MIB
    assert dense.activation_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_fits_and_one_more_does_not(checkpointing):
    config = llama(hidden_size=128, max_position_embeddings=512).config

    def peak(size: int) -> int:
        return scaling.fggm_step(scaling.on_paper(config), size, 512, checkpointing).beside_the_base

    peaks = {size: peak(size) for size in scaling.SIZES}
    for size in (1, 2, 9, 40):
        assert scaling.largest_batch(peak(size) + 1, peaks) == size
    assert scaling.largest_batch(peak(1) - 1, peaks) == 0


def test_the_peak_may_occur_at_another_moment_for_larger_batches():
    """Gradients at the end of backward have a fixed size; saved activations grow with the batch size."""
    moments = [lambda b: 100 + b, lambda b: 10 + 5 * b]
    peaks = {size: max(moment(size) for moment in moments) for size in (2, 3, 64, 65)}
    for memory in range(101, 400):
        exact = max(b for b in range(100) if max(moment(b) for moment in moments) <= memory)
        assert scaling.largest_batch(memory, peaks) == exact


def test_lora_on_the_meta_device_has_the_size_of_real_lora():
    model = scaling.on_paper(llama(hidden_size=128).config)
    step = scaling.lora_step(model, 20_000, 2, 16, False)
    real = llama(torch.bfloat16, hidden_size=128)
    adapted = get_peft_model(real, LoraConfig(r=scaling.equal_rank(real, 20_000), target_modules="all-linear"))
    assert step.values == sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert not any("lora" in name for name, _ in model.named_parameters())


# Operations ---------------------------------------------------------------------------------------


def operations(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def frozen() -> int:
    """Operations of forward and backward with all weights frozen; head and attention are small here."""
    model = small()
    return operations(Step(model, common.batches(1, 2, 32, 64)[0]))


def small():
    return common.llama(256, 2, vocab=64).requires_grad_(False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["FGGM", "LoRA", "full"])
def test_a_training_step_takes_the_predicted_operations(method, checkpointing, frozen):
    density, model = 0.1, small()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if method == "FGGM":
        model = get_peft_model(model, FGGMConfig(density=density, criterion="random"))
    elif method == "LoRA":
        values = round(density * targeted_values(model))
        rank = scaling.equal_rank(model, values)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    else:
        for layer in scaling.linears(model).values():
            layer.requires_grad_(True)
    counted = operations(Step(model, common.batches(1, 2, 32, 64)[0]))
    assert counted / frozen == pytest.approx(scaling.training_multiple(method, density, checkpointing), rel=0.1)


@pytest.mark.parametrize("length", [32, 128, 256])
def test_a_selection_pass_takes_the_predicted_operations(length):
    batches = common.batches(2, 2, length, 64)
    floor = operations(Step(small(), batches[0]))

    def counted(number: int) -> float:
        model = get_peft_model(small(), FGGMConfig(num_samples=None))
        return operations(lambda: select_parameters(model, batches[:number], progress=False))

    # the difference, because the first batch is also read to find its samples
    assert (counted(2) - counted(1)) / floor == pytest.approx(scaling.selection_multiple(small(), length), rel=0.1)


# The page -----------------------------------------------------------------------------------------


def test_the_tables_of_the_page_match_the_stored_results():
    results = json.loads((scaling.RESULTS / "scaling.json").read_text())["results"]
    page = scaling.PAGE.read_text()
    assert all(f"<!-- table: {name} -->" in page for name in scaling.TABLES)
    assert scaling.with_tables(page, results) == page
