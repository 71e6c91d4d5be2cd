"""``PeftMixedModel`` rejects FGGM, and accepts it with the change of PEFT that docs/upstream proposes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from models import llama
from peft import LoraConfig, PeftMixedModel, get_peft_model

from fggm_peft import FGGMConfig

ROOT = Path(__file__).parents[2]
PATCH = ROOT / "docs" / "upstream" / "peft_mixed_model.patch"
PATCHED_VERSION = "0.21.2"


def test_pefts_mixed_model_rejects_fggm(tmp_path):
    with pytest.raises(ValueError, match=r"'FGGM' is not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), FGGMConfig(), mixed=True)
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match=r"'FGGM' is not compatible"):
        model.add_adapter("task", FGGMConfig())
    assert list(model.peft_config) == ["default"]
    get_peft_model(llama(), FGGMConfig(criterion="random")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Adapter of type (PeftType\.)?FGGM is not supported for mixed models"):
        PeftMixedModel.from_pretrained(llama(), tmp_path)


@pytest.mark.skipif(peft.__version__ != PATCHED_VERSION, reason=f"the patch is for PEFT {PATCHED_VERSION}")
@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patch")
def test_fggm_is_mixed_with_lora_by_the_patched_peft(tmp_path):
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "src" / "peft")
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}  # tmp_path may be in a repository
    subprocess.run(["git", "apply", "--verbose", PATCH], cwd=tmp_path, env=environment, check=True)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "src"), str(ROOT)])
    cases = Path(__file__).with_name("mixed_model_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", cases]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout.decode()[-6000:]
