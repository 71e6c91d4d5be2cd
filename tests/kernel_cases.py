"""Test cases for the Triton kernels, both interpreted and compiled.

``core/test_kernels.py`` runs them in Triton's interpreter, in a separate process because ``TRITON_INTERPRET`` must be
set before Triton is imported. ``core/test_gpu_kernels.py`` runs them on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from reference import TOLERANCE, dense_delta, relative_error, seeded, units
from torch import nn

from fggm_peft import FGGMConfig
from fggm_peft.core import kernels
from fggm_peft.core.granularity import Granularity, granularity_from
from fggm_peft.core.linear import effective_linear

triton = pytest.importorskip("triton")
from fggm_peft.core.triton import elements, tiles  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.int32, torch.int64]
# (positions, output features, input features): one tile, several tiles, no positions; no size is a multiple of a block
SHAPES = [(5, 20, 30), (70, 70, 150), (0, 9, 7), (261, 3, 200)]
KERNELS = {
    "dots": (elements.sampled_dots_kernel, elements.DOTS),
    "tiles": (elements.sampled_tiles_kernel, tiles.TILES),
    "gathered": (tiles.gathered_product_kernel, tiles.TILES),
}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_index_dtype = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_in_the_interpreter():
    """Use torch's bfloat16: Triton's interpreter multiplies the raw bits and rounds towards zero."""
    if not INTERPRETED:
        yield
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self, handle, dtype):
        source, target = handle.dtype.scalar, dtype.scalar
        if (source, target) == (float32, bfloat16):
            rounded = torch.from_numpy(handle.data.copy()).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.uint16).numpy(), target)
        return cast_impl(self, handle, dtype)

    def dot(self, a, b, *rest):
        if a.dtype.scalar == bfloat16:
            a, b = cast_impl(self, a, float32), cast_impl(self, b, float32)
        return create_dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    yield
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


@pytest.fixture
def always(monkeypatch):
    """Use kernels wherever they can run; returns the names of those that ran."""
    ran = []
    monkeypatch.setattr(kernels, "_mode", "always")
    if INTERPRETED:
        monkeypatch.setattr(kernels, "_on_gpu", lambda tensor: True)
    for module, name in (
        (elements, "add_elements_"),
        (elements, "sampled_dots"),
        (elements, "sampled_tiles"),
        (tiles, "gathered_product_"),
    ):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, kernel=kernel, name=name: ran.append(name) or kernel(*args))
    return ran


def some(total, k, index_dtype, seed=0):
    return torch.randperm(total, generator=seeded(seed))[:k].sort().values.to(DEVICE, index_dtype)


def counts(total, most=None):
    return [k for k in sorted({0, 1, min(17, total), total // 3, total}) if most is None or k <= most]


def matrix(rows, columns, dtype, strided=False):
    """Random numbers, contiguous or a strided transposed view."""
    if not strided:
        return torch.randn(rows, columns).to(DEVICE, dtype)
    return torch.randn(columns * 2, rows).to(DEVICE, dtype)[::2].T


def gathered(x, g, indices, transposed):
    """The gradient of selected rows, or of selected columns."""
    chosen, other = (x, g) if transposed else (g, x)
    return kernels.gathered_product(chosen, other, indices, transposed)


# Each kernel against float64 -----------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
@each_index_dtype
@each_dtype
@pytest.mark.parametrize("product", [elements.sampled_dots, elements.sampled_tiles])
def test_sampled_entries_of_a_product_agree_with_dense(product, dtype, index_dtype, strided):
    most = 300 if product is elements.sampled_dots else None  # the interpreter is slow for each block of entries
    for n, o, i in SHAPES:
        x, g = matrix(n, i, dtype, strided), matrix(n, o, dtype, strided)
        dense = (g.double().T @ x.double()).reshape(-1)
        for k in counts(o * i, most):
            indices = some(o * i, k, index_dtype, seed=k)
            result = product(x, g, indices)
            assert result.dtype == dtype
            assert relative_error(result, dense[indices.long()]) < TOLERANCE[dtype]


@pytest.mark.parametrize("strided", [False, True])
@each_index_dtype
@each_dtype
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_products_of_gathered_units_agree_with_dense(transposed, dtype, index_dtype, strided):
    for n, o, i in SHAPES:
        x, g = matrix(n, i, dtype, strided), matrix(n, o, dtype, strided)
        dense = g.double().T @ x.double()
        for k in counts(i if transposed else o):
            indices = some(i if transposed else o, k, index_dtype, seed=k)
            result = gathered(x, g, indices, transposed)
            assert result.dtype == dtype and result.is_contiguous()
            expected = dense[:, indices.long()] if transposed else dense[indices.long()]
            assert relative_error(result, expected) < TOLERANCE[dtype]


@each_index_dtype
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@each_dtype
def test_added_elements_are_rounded_once_and_no_other_entry_changes(dtype, value_dtype, index_dtype):
    shape = (50, 70)
    for strided in (False, True):
        for k in (0, 1, 1024, 1025, 3500):
            indices = some(3500, k, index_dtype, seed=k)
            values = torch.randn(k, generator=seeded(k)).to(DEVICE, value_dtype)
            weight = matrix(*shape, dtype, strided)
            for scale in (1.0, -0.5):  # multiplying a value by these is exact
                exact = weight.cpu().double() + scale * dense_delta("element", shape, indices.cpu(), values.cpu())
                changed = weight.clone(memory_format=torch.preserve_format)
                kernels.add_elements_(changed, indices, values, scale)
                assert torch.equal(changed.cpu(), exact.float().to(dtype))


def test_the_scale_is_applied_in_float32_as_in_the_pytorch_implementation():
    indices, values = some(3500, 700, torch.int32), torch.randn(700, device=DEVICE)
    for dtype in DTYPES:
        weight = matrix(50, 70, dtype)
        expected = weight.clone()
        Granularity.add_(granularity_from("element"), expected, indices, values, 0.3)
        kernels.add_elements_(weight, indices, values, 0.3)
        assert relative_error(weight, expected) <= (1e-7 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("product", [elements.sampled_dots, elements.sampled_tiles])
def test_indices_can_address_a_weight_of_two_to_the_31_entries(product):
    o, i = 32767, 65536  # the next row would end at 2**31
    if INTERPRETED and product is elements.sampled_tiles:
        pytest.skip("hundreds of thousands of tiles")
    x, g = torch.rand(1, i, device=DEVICE), torch.rand(1, o, device=DEVICE)
    for index_dtype, rows in ((torch.int32, o), (torch.int64, o + 9)):
        g = torch.rand(1, rows, device=DEVICE)
        indices = torch.tensor([5, (rows - 1) * i + 7, rows * i - 1], dtype=index_dtype, device=DEVICE)
        expected = torch.stack([x[0, 5] * g[0, 0], x[0, 7] * g[0, -1], x[0, -1] * g[0, -1]])
        torch.testing.assert_close(product(x, g, indices), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_autotuning_does_not_change_the_bits(name, monkeypatch):
    kernel, choices = KERNELS[name]
    x, g = matrix(150, 140, torch.bfloat16), matrix(150, 136, torch.bfloat16)
    indices = some(136 * 140, 500, torch.int32)
    calls = {
        "dots": lambda: elements.sampled_dots(x, g, indices),
        "tiles": lambda: elements.sampled_tiles(x, g, indices),
        "gathered": lambda: gathered(x, g, some(136, 99, torch.int32), False),
    }
    results = []
    for choice in choices:
        monkeypatch.setattr(kernel, "configs", [choice])
        results.append(calls[name]())
    assert all(torch.equal(result, results[0]) for result in results)


# Through the library -------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("k", [0, 3, 20, 100])
def test_a_layer_trains_like_a_dense_delta(granularity, dtype, k, make_delta, always):
    shape, n = (24, 40), 33
    delta = make_delta(granularity, shape, min(k, units(granularity, shape)), scale=0.5)
    indices, values = delta.indices.to(DEVICE), delta.values.detach().to(DEVICE).requires_grad_()
    delta = dataclasses.replace(delta, indices=indices, values=values)
    weight, x, g = matrix(*shape, dtype), matrix(n, shape[1], dtype).requires_grad_(), matrix(n, shape[0], dtype)
    y = effective_linear(x, lambda: weight.clone(), None, [delta])
    y.backward(g)
    values = delta.values.detach().cpu().double().requires_grad_()
    dense = weight.cpu().double() + 0.5 * dense_delta(granularity, shape, delta.indices.cpu(), values)
    wide = x.detach().cpu().double().requires_grad_()
    expected = wide @ dense.T
    expected.backward(g.cpu().double())
    tolerance = TOLERANCE[dtype]
    assert relative_error(y.cpu(), expected) < tolerance and relative_error(x.grad.cpu(), wide.grad) < tolerance
    assert relative_error(delta.values.grad.cpu(), values.grad) < tolerance
    few = k <= kernels._DOTS_MAX_DENSITY[dtype] * weight.numel()
    expected = {
        "element": ["add_elements_", "add_elements_", "sampled_dots" if few else "sampled_tiles"],
        "row": ["gathered_product_"],
        # for few columns the forward pass already gathers the input; for all columns nothing is gathered
        "column": ["gathered_product_"] if k == 20 else [],
    }
    assert always == expected[granularity]


def layers(granularity):
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(up=nn.Linear(16, 32), act=nn.Tanh(), down=nn.Linear(32, 8))).to(DEVICE)
    options = {"target_modules": ["up", "down"], "criterion": "random", "density": 0.5, "init_weights": False}
    return get_peft_model(base, FGGMConfig(granularity=granularity, **options))


def test_a_compiled_model_is_one_graph_in_every_granularity(granularity, always):
    torch._dynamo.reset()
    model, x = layers(granularity), torch.randn(40, 16, device=DEVICE)
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), values)
    always.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, reference in zip(torch.autograd.grad(compiled(x).square().sum(), values), expected, strict=True):
        torch.testing.assert_close(actual, reference)
    assert always  # the graph contains the kernels


def test_an_exported_program_contains_only_pytorch_operators(granularity, always):
    model, x = layers(granularity).eval(), torch.randn(40, 16, device=DEVICE)
    program = torch.export.export(model, (x,))
    always.clear()
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("fggm_peft" in str(node.target) for node in program.graph.nodes)


def test_autocast_does_not_change_the_dtype_of_kernel_inputs(granularity, always):
    model, x = layers(granularity), torch.randn(40, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(x).square().sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert always and all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


def test_the_operators_pass_opcheck():
    x, g = matrix(9, 30, torch.float32), matrix(9, 20, torch.float32)
    operators = torch.ops.fggm_peft
    torch.library.opcheck(operators.sampled_product.default, (x, g, some(600, 7, torch.int32)))
    torch.library.opcheck(operators.sampled_product.default, (x, g, some(600, 300, torch.int64)))
    for transposed in (False, True):
        torch.library.opcheck(operators.gathered_product.default, (g, x, some(20, 7, torch.int32), transposed))
    weight, indices = matrix(20, 30, torch.bfloat16), some(600, 7, torch.int32)
    torch.library.opcheck(operators.add_elements_.default, (weight, indices, torch.randn(7, device=DEVICE), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["scatter", "sampled product", "gathered rows", "gathered columns"])
def test_the_implementations_that_the_benchmark_compares_agree(name, dtype, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from gpu.kernels import COMPARED, check

    compare, densities = COMPARED[name]
    for density in (densities[1], densities[-1]):
        check(compare(matrix(40, 30, dtype), matrix(40, 20, dtype), density))
