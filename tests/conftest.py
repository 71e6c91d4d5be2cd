"""Fixtures that several test modules share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import huggingface_hub
import pytest
import torch
from command_line import folder, selected, trained  # noqa: F401
from hub_stand_in import HubStandIn
from peft import get_peft_model
from processes import Processes
from reference import KINDS, seeded, units
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fggm_peft import FGGMConfig
from fggm_peft.core.granularity import granularity_from
from fggm_peft.core.weight_delta import WeightDelta


def pytest_configure():
    # with several pytest workers, torch's threads compete for cores and slow small models down a hundredfold
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def granularity(request) -> str:
    """The name of every granularity in the registry."""
    return request.param


@pytest.fixture(scope="session")
def make_delta() -> Callable[..., WeightDelta]:
    """Builds a random delta of ``k`` units; its values are a leaf tensor that requires grad."""

    def make(name, shape, k, dtype=torch.float32, scale=1.0, seed=0, index_dtype=torch.int32):
        generator = seeded(seed)
        indices = torch.randperm(units(name, shape), generator=generator)[:k].sort().values.to(index_dtype)
        values = torch.randn(granularity_from(name).values_shape(shape, k), generator=generator, dtype=torch.float64)
        return WeightDelta(granularity_from(name), indices, values.to(dtype).requires_grad_(), scale)

    return make


@dataclass(frozen=True)
class LayerExample:
    """A base layer that supports adapters, and an input for it."""

    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        layer = self.build().to(dtype)
        for parameter in layer.parameters():  # Conv1D initializes its bias to zero
            nn.init.normal_(parameter, std=0.5)
        return layer

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        x = self.input()
        return x.to(dtype) if x.is_floating_point() else x


class ExampleRouter(nn.Module):
    """A router that returns its logits only."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 7))

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


LAYER_EXAMPLES = {
    "linear": LayerExample(lambda: nn.Linear(7, 5), lambda: torch.randn(4, 9, 7)),
    "linear without bias": LayerExample(lambda: nn.Linear(6, 8, bias=False), lambda: torch.randn(3, 6)),
    "Conv1D": LayerExample(lambda: Conv1D(5, 7), lambda: torch.randn(2, 6, 7)),
    "conv1d": LayerExample(lambda: nn.Conv1d(3, 5, 3, padding="same"), lambda: torch.randn(2, 3, 8)),
    "conv2d": LayerExample(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), lambda: torch.randn(2, 4, 7, 5)),
    "conv2d grouped": LayerExample(
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1, bias=False),
        lambda: torch.randn(2, 4, 6, 5),
    ),
    "conv2d channels last": LayerExample(
        lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last),
    ),
    "conv3d": LayerExample(lambda: nn.Conv3d(2, 4, 2, dilation=2), lambda: torch.randn(2, 2, 5, 4, 4)),
    "router": LayerExample(ExampleRouter, lambda: torch.randn(4, 7)),
    "embedding": LayerExample(lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (3, 5))),
}


@pytest.fixture(scope="session")
def layer_examples() -> dict[str, LayerExample]:
    return LAYER_EXAMPLES


@pytest.fixture(params=list(LAYER_EXAMPLES))
def example(request) -> LayerExample:
    """An example of each layer type that supports adapters."""
    return LAYER_EXAMPLES[request.param]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two worker processes that run functions of the test module."""
    processes = Processes()
    yield processes
    processes.stop()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubStandIn]:
    """An empty local Hub that this process uses."""
    with HubStandIn() as hub:
        hub.stand_in(monkeypatch, tmp_path / "hub")
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def adapt() -> Callable:
    """Wraps one layer in a model with an FGGM adapter; its support and values are random by default."""

    def wrap(layer: nn.Module, zero: bool = False, **config):
        options = {"target_modules": ["layer"], "criterion": "random", "density": 0.4} | config
        model = get_peft_model(nn.Sequential(OrderedDict(layer=layer)), FGGMConfig(**options))
        for name, parameter in model.named_parameters():
            if "fggm_" in name and not zero:
                nn.init.normal_(parameter)  # init_weights=False would sample in the base model's dtype
        return model

    return wrap
