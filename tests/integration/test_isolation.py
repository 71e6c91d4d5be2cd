"""Layers share no mutable state: threads, other models and failed steps do not affect a step."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from itertools import pairwise

import pytest
import torch
from models import QUANTIZATIONS, adapted, fggm_layers, llama, quantized, token_batches
from torch import nn
from torch.utils.checkpoint import checkpoint

BATCHES = token_batches(sizes=(3, 2, 4, 3))
BASES = ["dense", *QUANTIZATIONS[::3]]  # "nf4" and "int8"


def small_model(granularity: str, base: str = "dense", seed: int = 0) -> nn.Module:
    """A Llama with random supports and values, so that every effective weight differs from its base weight."""
    model = llama() if base == "dense" else quantized(llama(), base)
    model = adapted(model, granularity, density=0.3, criterion="random", target_modules="all-linear").train()
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    """Gradients of the loss; ``.grad`` is not changed."""
    return list(torch.autograd.grad(model(**batch).loss, trained(model)))


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_concurrent_threads_get_their_own_gradients(base, checkpointing, granularity):
    model = small_model(granularity, base)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = [gradients(model, batch) for batch in BATCHES]
    actual: dict[int, list] = {}

    def work(number: int) -> None:
        actual[number] = [gradients(model, BATCHES[number]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(BATCHES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, alone in enumerate(expected):
        assert len(actual[number]) == 3, "the thread failed"
        for result in actual[number]:
            assert_equal(result, alone)


def test_the_forward_of_one_layer_may_run_during_the_backward_of_another(granularity):
    """Activation checkpointing reruns the forward of a layer during the backward of the next one."""
    model = small_model(granularity)
    first, second = list(fggm_layers(model, "default").values())[:2]
    x = torch.randn(5, 64, requires_grad=True)

    def both(x, checkpointed: bool):
        def run(layer, x):
            return checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)

        return (run(first, torch.tanh(run(first, x))) * run(second, x).sum()).square().sum()

    leaves = [x, first.fggm_values["default"], second.fggm_values["default"]]
    plain, checkpointed = (torch.autograd.grad(both(x, how), leaves) for how in (False, True))
    assert_equal(checkpointed, plain)


def test_two_interleaved_models_give_the_gradients_of_each_alone(granularity):
    one, other = small_model(granularity), small_model(granularity, seed=1)
    expected = gradients(one, BATCHES[0]), gradients(other, BATCHES[1])
    losses = one(**BATCHES[0]).loss, other(**BATCHES[1]).loss  # same shapes, dtype and device
    actual = torch.autograd.grad(losses[0], trained(one)), torch.autograd.grad(losses[1], trained(other))
    for interleaved, alone in zip(actual, expected, strict=True):
        assert_equal(interleaved, alone)


@pytest.mark.parametrize("base", BASES)
def test_a_failed_step_does_not_affect_the_next_one(base, granularity):
    model = small_model(granularity, base)
    expected = gradients(model, BATCHES[0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    *_, last = fggm_layers(model, "default").values()

    def fail(*_):
        raise MemoryError

    for register in (last.register_forward_pre_hook, last.register_full_backward_pre_hook):
        hook = register(fail)
        with pytest.raises(MemoryError):
            model(**BATCHES[1]).loss.backward()
        hook.remove()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        assert_equal(gradients(model, BATCHES[0]), expected)
        model.zero_grad()


@pytest.mark.parametrize("base", BASES)
def test_a_deleted_model_frees_all_its_tensors(base, granularity):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    counts, watched = [tensors()], []
    for _ in range(3):
        model = small_model(granularity, base)
        gradients(model, BATCHES[0])
        watched += [weakref.ref(layer) for layer in fggm_layers(model, "default").values()]
        assert tensors() > counts[-1]
        del model
        counts.append(tensors())
    assert not any(reference() for reference in watched)
    # a leak increases the count in every round; libraries and earlier tests change it only once
    assert any(after <= before for before, after in pairwise(counts))


def test_a_cast_or_copied_model_uses_its_own_weights(granularity):
    model = small_model(granularity)
    double, duplicate = copy.deepcopy(model).double(), copy.deepcopy(model)
    expected = gradients(model, BATCHES[0])
    for parameter in duplicate.parameters():
        parameter.data.zero_()
    for exact, single in zip(gradients(double, BATCHES[0]), expected, strict=True):
        torch.testing.assert_close(single, exact.float(), rtol=1e-3, atol=1e-5)
    assert_equal(gradients(model, BATCHES[0]), expected)
    assert not any(gradient.any() for gradient in gradients(duplicate, BATCHES[0]))


def test_the_repr_of_a_layer_names_the_form_of_its_product(granularity):
    model = small_model(granularity)
    layer = next(iter(fggm_layers(model, "default").values()))
    assert "effective weight" in layer.extra_repr()
    hook = layer.base_layer.register_forward_hook(lambda *_: None)
    assert "additive" in layer.extra_repr()
    hook.remove()
    assert "effective weight" in layer.extra_repr()
