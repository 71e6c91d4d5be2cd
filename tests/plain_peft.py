"""Loads exported adapters in a process in which this library cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from models import token_batches
from torch import nn

BATCH = {key: value for key, value in token_batches()[0].items() if key != "labels"}
SCRIPT = """
import sys, torch
sys.modules["fggm_peft"] = None  # importing it raises an error
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()
batch = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save({"adapted": model(**batch).logits, "merged": model.merge_and_unload()(**batch).logits}, sys.argv[4])
assert not any(name.startswith("fggm_peft.") for name in sys.modules)
"""


def by_plain_peft(base: nn.Module, folder: Path, tmp_path: Path) -> dict:
    """Logits of ``BATCH`` by the base with the exported adapter, and by the merged model."""
    base.save_pretrained(tmp_path / "base")
    torch.save(BATCH, tmp_path / "batch.pt")
    arguments = map(str, (tmp_path / "base", folder, tmp_path / "batch.pt", tmp_path / "logits.pt"))
    command = [sys.executable, "-c", SCRIPT, *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(tmp_path / "logits.pt")
