"""Products of 16-bit matrices in float32. A GPU is replaced by a tensor that says it is one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import relative_error

from fggm_peft.core import wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 7, 5, 3)], ids=str)
def test_products_are_summed_in_float32(dtype, shape):
    *batch, n, k, m = shape
    a, b = torch.randn(*batch, k, n).to(dtype).mT, torch.randn(*batch, k, m).to(dtype)
    product = wide.wide_product(a, b)
    assert product.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(product, a.double() @ b.double()) < (1e-14 if dtype == torch.float64 else 1e-6)
    out = torch.empty_like(product)
    assert wide.wide_product(a, b, out=out) is out and torch.equal(out, product)
    assert wide.gradient_product(a, b).dtype == dtype


def on_gpu(dtype=torch.bfloat16, **attributes):
    """What ``multiplies_wide`` reads of a tensor."""
    given = {"is_cuda": True, "dtype": dtype, "device": torch.device("cuda"), "requires_grad": False, **attributes}
    return SimpleNamespace(**given)


def test_float32_results_are_requested_only_where_torch_supports_them(monkeypatch):
    monkeypatch.setattr(wide, "Tensor", SimpleNamespace)  # the stand-in counts as a plain tensor
    properties = SimpleNamespace(major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    half = on_gpu()
    assert wide.multiplies_wide(half, half)
    assert not wide.multiplies_wide(half, on_gpu(torch.float16))
    assert not wide.multiplies_wide(on_gpu(torch.float32), on_gpu(torch.float32))
    trained = on_gpu(requires_grad=True)
    assert not wide.multiplies_wide(trained, half)
    with torch.no_grad():
        assert wide.multiplies_wide(trained, half)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert wide.multiplies_wide(half, half) and not wide.multiplies_wide(*[on_gpu(torch.float16)] * 2)
    properties.major = 7  # T4, V100
    assert not wide.multiplies_wide(half, half)
    properties.major = 9
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not wide.multiplies_wide(half, half)


def test_other_kinds_of_tensors_use_plain_products(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))
    assert not wide.multiplies_wide(on_gpu(), on_gpu())  # not exactly a Tensor, such as a fake one
