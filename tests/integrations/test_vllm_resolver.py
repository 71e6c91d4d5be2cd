"""The resolver of vLLM, with stand-ins of its two modules that have the published interface (vLLM 0.33)."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType

import pytest
import torch
from example_deltas import adapter
from models import llama, logits, token_batches
from peft import PeftModel

from fggm_peft.integrations import vllm_resolver


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder with the base and two adapters, and the registered resolver."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    for name in ("sums", "names"):
        model = adapter("column", base=llama().from_pretrained(tmp_path / "base"), density=0.1)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapters" / name)
    registry = {}
    request, resolver = ModuleType("vllm.lora.request"), ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver = object
    resolver.LoRAResolverRegistry = type("Registry", (), {"register_resolver": staticmethod(registry.__setitem__)})
    for module in (ModuleType("vllm"), ModuleType("vllm.lora"), request, resolver):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("FGGM_ADAPTERS", str(tmp_path / "adapters"))
    vllm_resolver.register()
    return tmp_path, lambda name, base=None: asyncio.run(
        registry["FGGM"].resolve_lora(base or str(tmp_path / "base"), name)
    )


def test_a_request_gets_an_exact_lora_which_is_exported_once(served):
    folder, resolve = served
    request = resolve("sums")
    assert request.lora_name == "sums" and request.lora_int_id > 0
    base = llama().from_pretrained(folder / "base")
    expected = logits(PeftModel.from_pretrained(base, folder / "adapters" / "sums"), token_batches()[0])
    base = llama().from_pretrained(folder / "base")
    lora = PeftModel.from_pretrained(base, request.lora_path)
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(lora, token_batches()[0]), expected, rtol=1e-4, atol=1e-5)
    written = (folder / "adapters" / ".lora").glob("*/*")
    times = {file: file.stat().st_mtime_ns for file in written}
    assert resolve("sums") == request and {file: file.stat().st_mtime_ns for file in times} == times
    assert resolve("names").lora_int_id != request.lora_int_id


def test_a_changed_adapter_is_exported_again(served):
    folder, resolve = served
    before = resolve("sums")
    file = folder / "adapters" / "sums" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": "new"}))
    assert resolve("sums").lora_path != before.lora_path


def test_other_names_bases_and_kinds_are_not_found(served):
    folder, resolve = served
    assert resolve("missing") is None and resolve("sums", base="another/base") is None
    for name in ("../adapters/sums", str(folder / "adapters" / "sums"), "sums/.", ".lora", "", ".."):
        assert resolve(name) is None
    assert resolve("sums") is not None  # a LoRA in the folder belongs to vLLM's own resolver
    lora = next((folder / "adapters" / ".lora").iterdir())
    lora.rename(folder / "adapters" / "lora")
    assert resolve("lora") is None


def test_the_plugin_is_off_without_a_folder_and_names_a_wrong_one(monkeypatch, tmp_path):
    monkeypatch.delenv("FGGM_ADAPTERS", raising=False)
    vllm_resolver.register()  # vLLM is not imported
    monkeypatch.setenv("FGGM_ADAPTERS", str(tmp_path / "missing"))
    with pytest.raises(NotADirectoryError, match="FGGM_ADAPTERS"):
        vllm_resolver.register()


def test_vllm_finds_the_plugin():
    names = {entry.value for entry in entry_points(group="vllm.general_plugins")}
    if not names:
        pytest.skip("the package was installed before it had the entry point")
    assert "fggm_peft.integrations.vllm_resolver:register" in names
