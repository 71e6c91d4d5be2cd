"""The statistics that a pass collects, against float64 autograd of the model's own loss."""

from __future__ import annotations

import pytest
import torch
from models import adapted, fggm_layers, llama, token_batches
from torch import nn

from fggm_peft import select_parameters
from fggm_peft.core.statistics import STATISTICS
from fggm_peft.selection.data_pass import DataPass
from fggm_peft.tuner.target import find_targets


def gathered(model, batches, *statistics, log_likelihood=None):
    """(module, statistic) -> mean over all samples."""
    config = model.peft_config["default"]
    targets = find_targets(model, "default")
    totals = DataPass(model, config, batches, log_likelihood, statistics=statistics).run(targets)
    return {(path, key): totals.mean(path, key) for path in targets for key in statistics}


def assert_close(found, expected, tolerance=1e-4):
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found.double().view(expected.shape), expected, rtol=1e-3, atol=scale * tolerance)


@pytest.mark.parametrize("use_cache_of_gradients", [False, True])
def test_input_moments_are_means_over_unpadded_positions(use_cache_of_gradients):
    """Every position counts once, even if a pass with checkpointing also collects gradients."""
    batches, plain = token_batches(), llama().eval()
    model = adapted(llama(), "row")
    names = ("input_second_moment",)
    if use_cache_of_gradients:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        names = ("fisher", *names)
    result = gathered(model, batches, *names)
    seen: dict = {}
    for name in fggm_layers(model, "default"):
        hook = lambda m, a, y, name=name: seen.setdefault(name, []).append(a[0])  # noqa: E731
        plain.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            plain(**batch)
    for name, calls in seen.items():
        real = [batch["attention_mask"] == 1 for batch in batches]
        x = torch.cat([x[where] for x, where in zip(calls, real, strict=True)]).double()
        assert_close(result[name, "input_second_moment"], x.square().mean(0))


def test_criteria_of_input_features_reject_embeddings():
    model = adapted(llama(), "column", criterion="input_ratio", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"module model\.embed_tokens: .*leave it out of the targets"):
        select_parameters(model, token_batches(), reference=token_batches(), progress=False)


def test_the_inputs_of_convolutions_are_their_patches():
    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)

        def forward(self, pixels):
            return self.conv(pixels).mean((2, 3))

    batches = [{"pixels": torch.randn(3, 4, 5, 5), "labels": torch.tensor([0, 1, 2])} for _ in range(2)]
    likelihood = lambda model, b: -nn.functional.cross_entropy(model(b["pixels"]), b["labels"], reduction="none")  # noqa: E731
    model = adapted(Image(), "row", target_modules=["conv"])
    result = gathered(model, batches, "input_second_moment", log_likelihood=likelihood)
    pixels = torch.cat([b["pixels"] for b in batches]).double()
    patches = nn.functional.unfold(pixels, 3, padding=1).unflatten(1, (2, 18))
    assert_close(result["conv", "input_second_moment"], patches.square().mean((0, 1, 3)))


def test_every_statistic_declares_its_length_and_entries_per_number(granularity):
    from fggm_peft.core.granularity import granularity_from
    from fggm_peft.core.statistics import ones

    kind, shape = granularity_from(granularity), (6, 9)
    for name, statistic in STATISTICS._entries.items():
        values = ones(name, kind, shape)
        expected = 9 if name == "input_second_moment" else kind.units(shape)
        assert len(values) == expected and (values == 1).all()
        per_number = 1 if name == "input_second_moment" else 54 // len(values)
        assert statistic.entries(kind, shape) == per_number
