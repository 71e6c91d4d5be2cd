"""Linear layers of libraries that cannot be installed here, by stand-ins with the same interface."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from models import adapted, fggm_layers, llama, logits, token_batches, train
from peft import PeftModel
from peft.utils import other, quantization_utils
from torch import nn

from fggm_peft import select_parameters

LIBRARIES = {  # as in docs/compatibility.md: module, class, and PEFT's function that finds the package
    "GPTQ, AWQ": ("gptqmodel.nn_modules.qlinear", "BaseQuantLinear", "is_gptqmodel_available"),
    "AQLM": ("aqlm", "QuantizedLinear", "is_aqlm_available"),
    "EETQ": ("eetq", "EetqLinear", "is_eetq_available"),
    "Intel Neural Compressor": (
        "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules",
        "PatchedLinear",
        "is_inc_available",
    ),
    "Transformer Engine `Linear`": ("transformer_engine.pytorch", "Linear", "is_te_pytorch_available"),
}
FUSED = ("LayerNormLinear", "LayerNormMLP")


class Quantized(nn.Module):
    """Integers with a scale for each row. There is no weight that a caller could read."""

    codebooks = ()  # of AQLM

    def __init__(self, dense: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        scales = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (dense.weight.detach() / scales).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales, self.bias)


@pytest.fixture
def stand_in(monkeypatch):
    """Builds a Llama whose linear layers are those of a library."""

    def install(library: str, name: str | None = None) -> nn.Module:
        path, class_name, is_available = LIBRARIES[library]
        names = [class_name, *(FUSED if "Transformer" in library else ())]
        classes = {each: type(each, (Quantized,), {}) for each in names}
        parts = path.split(".")
        modules = [ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))]
        for parent, child, part in zip(modules, modules[1:], parts[1:], strict=False):
            setattr(parent, part, child)
        vars(modules[-1]).update(classes)
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for user in (quantization_utils, other):
            monkeypatch.setattr(user, is_available, lambda: True, raising=False)
        model = llama()
        for path, layer in list(model.named_modules()):
            if path.endswith("_proj"):
                parent, _, child = path.rpartition(".")
                new = classes[name or class_name](layer)
                if name in FUSED:
                    new.layer_norm_weight = nn.Parameter(torch.ones(layer.in_features))
                setattr(model.get_submodule(parent), child, new)
        return model

    return install


BATCHES = token_batches(padding="right")
PROJECTIONS = r".*_proj"


@pytest.mark.parametrize("library", LIBRARIES)
def test_layers_that_cannot_be_dequantized_train_save_load_and_keep_their_deltas(library, stand_in, tmp_path):
    model = adapted(stand_in(library), "row", target_modules=PROJECTIONS, quantized_merge="keep")
    assert len(fggm_layers(model, "default")) == 14
    select_parameters(model, BATCHES, progress=False)
    losses = train(model, BATCHES[:1], steps=4)
    assert losses[-1] < losses[0]
    trained = logits(model, BATCHES[0])
    exact = stand_in(library)
    for path, layer in fggm_layers(model, "default").items():  # the same model with dense weights
        quantized = exact.get_submodule(path.removeprefix("base_model.model."))
        weight = quantized.qweight * quantized.scales + layer.get_delta_weight("default")
        quantized.forward = lambda x, weight=weight: nn.functional.linear(x, weight)
    torch.testing.assert_close(trained, logits(exact, BATCHES[0]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stand_in(library), tmp_path)
    assert torch.equal(logits(loaded, BATCHES[0]), trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), BATCHES[0]), trained)


@pytest.mark.parametrize("mode", ["auto", "requantize"])
def test_merging_into_them_is_one_clear_error(mode, stand_in):
    model = adapted(stand_in("EETQ"), "row", target_modules=PROJECTIONS, criterion="random", quantized_merge=mode)
    with pytest.raises(TypeError, match=r"eetq layers cannot be requantized. Set quantized_merge='keep'"):
        model.merge_adapter()


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_of_transformer_engine_are_rejected(name, stand_in):
    with pytest.raises(TypeError, match=rf"q_proj is a .*{name}, which FGGM does not support"):
        adapted(stand_in("Transformer Engine `Linear`", name), "row", target_modules=["q_proj"])


class OfItsOwnClass(torch.Tensor):
    """A floating-point tensor that contains another one, like those of quanto."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OfItsOwnClass(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{function} of a quantized tensor")


def test_a_weight_of_an_unknown_tensor_class_is_rejected():
    model = llama()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(OfItsOwnClass(layer.weight.detach().to(torch.int8)), requires_grad=False)
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.q_proj is a torch\.nn\..*Linear, which FGGM does not"):
        adapted(model, "row", target_modules=["q_proj"])


def test_the_docs_list_the_stand_ins():
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    rows = re.findall(r"^\| (.*?) \| stand-in \|", text, re.MULTILINE)
    assert rows == [*LIBRARIES, "Transformer Engine `LayerNormLinear`, `LayerNormMLP`", "quanto"]
