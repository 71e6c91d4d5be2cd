"""The inputs of experts and routers, against those that a loop over the experts computes in float64."""

from __future__ import annotations

import pytest
import torch
from models import adapted, mixture, token_batches
from torch import Tensor, nn

from fggm_peft import input_covariance
from fggm_peft.tuner.target import find_targets

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight", "router.weight"]


def with_adapter(name: str, **config) -> nn.Module:
    settings = {"criterion": "random", "target_parameters": PARAMETERS, "init_weights": False}
    return adapted(mixture(name, torch.float64, config.pop("implementation", "eager")), **settings | config)


def inputs_of_experts(name: str, batches: list[dict]) -> dict[str, Tensor]:
    """Path of each expert's matrix -> its inputs at positions that are no padding, ``[n, i]``."""
    model, found, real = mixture(name, torch.float64).eval(), {}, None

    def record(path, module, args):
        hidden, top_k = args[0].view(-1, args[0].shape[-1]), args[1] if len(args) > 1 else None
        for expert in range(4):
            if top_k is None:  # Llama 4: the tokens of all experts, zero where they are not routed to it
                x = hidden.view(4, -1, hidden.shape[-1])[expert][real]
                x = x[x.any(1)]
            else:
                x = hidden[real & (top_k == expert).any(1)]
            matrix = module.gate_up_proj[expert]
            product = x @ (matrix if name in ("GptOss", "Llama4") else matrix.mT)
            if name == "GptOss":
                y = module._apply_gate(product + module.gate_up_proj_bias[expert])
            else:
                gate, up = product.chunk(2, -1)
                y = module.act_fn(gate) * up
            for parameter, rows in (("gate_up_proj", x), ("down_proj", y)):
                found.setdefault(f"{path}.{parameter}.{expert}", []).append(rows)

    for path, module in model.named_modules():
        if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.Parameter):
            module.register_forward_pre_hook(lambda module, args, path=path: record(path, module, args))
    for batch in batches:
        real = batch["attention_mask"].flatten() != 0
        with torch.no_grad():
            model(**batch)
    return {path: torch.cat(parts) for path, parts in found.items()}


def assert_same_covariances(covariance, inputs: dict[str, Tensor]) -> None:
    """Up to one factor, the unit of the covariances."""
    dense = {path: x.mT @ x / max(1, len(x)) for path, x in inputs.items()}
    largest = max(dense, key=lambda path: float(dense[path].trace()))
    scale = float(covariance[largest].to(torch.float64).dense().trace() / dense[largest].trace())
    for path, matrix in dense.items():
        found = covariance[path].to(torch.float64).dense() / scale
        torch.testing.assert_close(found, matrix, atol=0.02 * float(matrix.abs().max()), rtol=0.02)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "Llama4", "DeepseekV3"])
def test_each_expert_has_the_covariance_of_its_tokens(name):
    batches = token_batches(sizes=(3, 2))
    inputs = inputs_of_experts(name, batches)
    plain = input_covariance(mixture(name, torch.float64), batches, modules=inputs, progress=False)
    assert_same_covariances(plain, inputs)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_every_implementation_has_the_same_inputs(implementation):
    batches = token_batches(sizes=(2,))
    model = with_adapter("Mixtral", implementation=implementation, init_weights=True)
    covariance = input_covariance(model, batches, progress=False)
    assert_same_covariances(covariance, inputs_of_experts("Mixtral", batches))
    assert "model.layers.1.mlp.gate" in covariance and "model.layers.1.self_attn.q_proj" in covariance
    assert model.config._experts_implementation == implementation


def test_a_router_that_multiplies_by_a_float32_copy():
    path, covariances = "model.layers.0.mlp.gate", []
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted(mixture("DeepseekV3", dtype), criterion="random", target_parameters=["gate.weight"])
        covariances.append(input_covariance(model, token_batches(), modules=[path], progress=False)[path])
    torch.testing.assert_close(*(c.to(torch.float32).dense() for c in covariances), rtol=0.1, atol=0.1)


def test_a_trained_adapter_counts():
    batches = token_batches(sizes=(2,))
    model = with_adapter("GptOss")
    merged = with_adapter("GptOss").merge_and_unload()
    modules = [path for path, target in find_targets(model, "default").items() if target.layer.is_expert]
    covariances = [input_covariance(net, batches, modules=modules, progress=False) for net in (model, merged)]
    for path in modules:
        torch.testing.assert_close(*(c[path].to(torch.float32).dense() for c in covariances), rtol=0.02, atol=0.02)


def test_an_expert_without_tokens_has_no_covariance():
    model = mixture("Mixtral")

    def avoid_expert_3(module, args, output):
        logits, weights, chosen = output
        return logits, weights, torch.where(chosen == 3, (chosen.roll(1, -1) + 1) % 3, chosen)

    model.model.layers[0].mlp.gate.register_forward_hook(avoid_expert_3)
    paths = [f"model.layers.0.mlp.experts.{name}.{e}" for name in ("gate_up_proj", "down_proj") for e in range(4)]
    covariance = input_covariance(model, token_batches(), modules=paths, progress=False)
    for path in paths:
        assert covariance[path].factor.any() != path.endswith(".3")
    assert covariance[paths[3]].factor.shape == (32, 0) and covariance[paths[3]].floor == 0


class Hidden(nn.Module):
    """Experts whose products have the weight first."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.num_experts, self.weights = 2, nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, input_ids, **_):
        return (self.weights @ self.embed(input_ids).mT).sum(0)


def test_a_product_that_cannot_be_observed_is_an_error():
    model = nn.Sequential()
    model.experts = Hidden()
    model.forward = lambda **batch: model.experts(**batch)
    with pytest.raises(ValueError, match=r"experts\.weights\.0: Hidden does not multiply its input by this parameter"):
        input_covariance(model, token_batches(sizes=(2,)), modules=["experts.weights.0"], progress=False)
    with pytest.raises(ValueError, match=r"no module experts\.weights\.2"):
        input_covariance(model, token_batches(sizes=(2,)), modules=["experts.weights.2"], progress=False)
