"""The README's snippets run, in order, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from models import llama, token_batches
from torch.utils.data import DataLoader

ROOT = Path(__file__).parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_snippets_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", classmethod(lambda cls, name: llama()), raising=True
    )
    samples = [{key: value[0] for key, value in batch.items()} for batch in token_batches(sizes=(1,)) * 40]
    names = {
        "dataloader": DataLoader(samples, batch_size=8),
        "dataset": samples,
        "training_arguments": transformers.TrainingArguments(
            output_dir="out", max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
        ),
    }
    assert len(SNIPPETS) == 3
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "trainable values" in capsys.readouterr().out
    assert {path.name for path in Path("delta").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_links_and_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
