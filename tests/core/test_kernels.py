"""The dispatch of Triton kernels, their results in Triton's interpreter, and their compilation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from fggm_peft.core import kernels

TESTS = Path(__file__).parents[1]
SHARED_MEMORY = {80: 163, 90: 227}  # capability -> KiB per program


@pytest.fixture
def on_gpu(monkeypatch):
    """Treat CPU tensors as GPU tensors, and Triton as installed."""
    monkeypatch.setattr(kernels, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(kernels, "_installed", True)
    monkeypatch.setattr(kernels, "_mode", "1")


def operands(dtype=torch.bfloat16, n=4, o=1024, i=1024):
    return torch.zeros(n, i, dtype=dtype), torch.zeros(n, o, dtype=dtype), torch.zeros(1024, dtype=torch.int32)


def test_the_kernels_pass_their_cases_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    command = [sys.executable, "-m", "pytest", "kernel_cases.py", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 50


# Dispatch ------------------------------------------------------------------------------------------


def test_cpu_tensors_use_no_kernel_in_any_mode():
    x, g, indices = operands()
    before = kernels.use_triton("always")
    try:
        assert not kernels.adds(x, g) and not kernels.samples(x, g, indices) and not kernels.gathers(x, g, indices)
    finally:
        assert kernels.use_triton(before) == "always"


def test_half_precision_uses_kernels_where_they_are_expected_to_be_faster(on_gpu):
    x, g, indices = operands()
    assert kernels.adds(x, g) and kernels.samples(x, g, indices) and kernels.gathers(g, x, indices)
    assert not kernels.gathers(g, operands(i=2049)[0], indices), "the product is the greater part"
    assert not kernels.gathers(g, x, indices[:1023]), "too few tiles"
    x, g, indices = operands(torch.float32)
    assert kernels.adds(x, g) and not kernels.gathers(g, x, indices)
    assert kernels.samples(x, g, indices) and not kernels.samples(x, g, indices.new_zeros(2**20 // 19))


@pytest.mark.parametrize(
    "reason", ["off", "not installed", "float64", "unequal dtypes", "records a gradient", "a subclass", "exporting"]
)
def test_all_other_cases_use_pytorch(reason, on_gpu, monkeypatch):
    x, g, indices = operands()
    if reason == "off":
        kernels.use_triton("0")
    elif reason == "not installed":
        monkeypatch.setattr(kernels, "_installed", False)
    elif reason == "float64":
        x, g = x.double(), g.double()
    elif reason == "unequal dtypes":
        x = x.half()
    elif reason == "records a gradient":
        x.requires_grad_()
    elif reason == "a subclass":
        x = x.as_subclass(type("Sharded", (torch.Tensor,), {}))
    elif reason == "exporting":
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not kernels.samples(x, g, indices) and not kernels.gathers(x, g, indices)
    assert kernels.adds(x, g) == (reason == "unequal dtypes")  # a weight of any dtype may have float32 values


def test_a_parameter_uses_a_kernel_only_without_grad(on_gpu):
    weight, values = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(3))
    assert not kernels.adds(weight, values)
    with torch.no_grad():
        assert kernels.adds(weight, values)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_devices_before_ampere_use_pytorch(capability, expected, monkeypatch):
    properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", {1: properties}.__getitem__)
    tensor = types.SimpleNamespace(is_cuda=True, get_device=lambda: 1)
    assert kernels._on_gpu(tensor) == expected


def test_an_unknown_mode_lists_the_valid_modes():
    with pytest.raises(ValueError, match=r"FGGM_PEFT_TRITON or use_triton\(\) must be one of '0', .* got 'on'"):
        kernels.use_triton("on")


@pytest.mark.parametrize(("value", "expected"), [(None, "1"), ("0", "0"), ("always", "always"), ("yes", None)])
def test_the_environment_sets_the_mode(value, expected):
    environment = {key: held for key, held in os.environ.items() if key != "FGGM_PEFT_TRITON"}
    environment |= {"FGGM_PEFT_TRITON": value} if value else {}
    script = "from core import kernels; print(kernels._mode)"
    command = [sys.executable, "-c", script]
    folder = TESTS.parent / "fggm_peft"
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if expected is None:
        assert "must be one of '0', '1', 'always', got 'yes'" in result.stderr
    else:
        assert result.stdout.strip() == expected


# Compilation without a device ----------------------------------------------------------------------


def compiled(kernel, config, constants, capability):
    """A kernel as machine code for bfloat16, int32 indices and contiguous matrices whose sizes divide by 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel.fn if hasattr(kernel, "configs") else kernel  # the kernel inside the autotuner
    units = dict.fromkeys({"g_o", "x_i", "chosen_unit", "other_unit", "result_unit", "stride_i"}, 1)
    constants = {name: value for name, value in (units | constants).items() if name in function.arg_names}
    kinds = {"scale": "fp32", "indices": "*i32", "starts": "*i64"}
    kinds |= dict.fromkeys(("weight", "values", "left", "right", "result", "g", "x", "chosen", "other"), "*bf16")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in function.arg_names}
    position = {name: (number,) for number, name in enumerate(function.arg_names)}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in ("n", "width", "g_n", "x_n")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={position[name]: value for name, value in constants.items()},
        attrs={position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_kernel_compiles_without_a_device(capability):
    pytest.importorskip("triton")
    from fggm_peft.core.triton import elements, tiles

    with_tensor_cores = "wgmma" if capability == 90 else "mma.sync"
    todo = [(elements.add_elements_kernel, None, {"CONTIGUOUS": flat, "BLOCK": 1024}) for flat in (True, False)]
    todo += [(elements.sampled_dots_kernel, elements.DOTS[-1], {"BLOCK_N": 256})]
    for kernel in (elements.sampled_tiles_kernel, tiles.gathered_product_kernel):
        todo += [(kernel, config, {"BLOCK_COLUMNS": 128}) for config in (tiles.TILES[0], tiles.TILES[-1])]
    for kernel, config, constants in todo:
        constants |= config.kwargs if config else {}
        program = compiled(kernel, config, constants, capability)
        assert program.asm["cubin"] and program.metadata.shared <= SHARED_MEMORY[capability] * 1024
        assert "__local_depot" not in program.asm["ptx"], "registers were spilled"
        assert ("BLOCK_COLUMNS" in constants) == (with_tensor_cores in program.asm["ptx"])


def test_the_page_on_gpus_documents_the_switch_points(monkeypatch):
    monkeypatch.setattr(kernels, "_mode", "1")
    page = (TESTS.parent / "docs" / "gpu.md").read_text()
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "gpu.md", "exec"), names)
    assert names["before"] == "1" == kernels._mode
    for dtype, limit in kernels._DOTS_MAX_DENSITY.items():
        assert f"{100 * limit:g} %" in page, dtype
    assert f"at most {kernels._GATHERED_MAX_WIDTH} wide" in page and kernels._GATHERED_MIN_ENTRIES == 2**20
