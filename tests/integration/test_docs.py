"""The snippets of the README and the docs run on a small model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl
from example_deltas import adapter
from huggingface_hub import ModelCard
from models import adapted, byte_tokenizer, fggm_layers, mixture, text_model, token_batches
from peft import get_peft_model
from torch.utils.data import DataLoader

from fggm_peft import CRITERIA, GRANULARITIES, LAYER_TYPES, METHODS, POLICIES, FGGMConfig, select_parameters
from fggm_peft.continual.methods import make_method
from fggm_peft.continual.reading import read_stream
from fggm_peft.deltas import SparseDelta
from fggm_peft.tuner.files.model_card import write_card
from fggm_peft.tuner.target import find_targets

ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_snippets_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"  # a local folder of that name overrides the Hub
    byte_tokenizer().save_pretrained(folder)
    text_model().save_pretrained(folder)
    samples = [{key: value[0] for key, value in batch.items()} for batch in token_batches(sizes=(1,)) * 40]
    uneven = [{key: value[: 4 + n % 3].tolist() for key, value in row.items()} for n, row in enumerate(samples)]
    sums = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(40)]
    quick = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    names = {
        "base": text_model(),
        "dataloader": DataLoader(samples, batch_size=8),
        "datasets": {"intents": uneven, "slots": uneven},
        "prompts_and_completions": datasets.Dataset.from_list(sums),
        "sft_arguments": trl.SFTConfig(save_strategy="no", bf16=False, **quick),
    }
    Path("prose.txt").write_text("One paragraph.\n\nAnother paragraph.")
    assert len(SNIPPETS) == 4
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), names)
    assert "trainable values" in capsys.readouterr().out
    assert names["trainer"].selection_report.samples <= 40
    for task in ("intents", "slots"):
        files = {path.name for path in Path(f"deltas/{task}").iterdir()}
        assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"
    byte_tokenizer().save_pretrained(folder)
    text_model().save_pretrained(folder)
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("num_train_epochs=1", "max_steps=2, use_cpu=True")
            exec(compile(source, "tutorial.ipynb", "exec"), names)
    assert [names["italian"](n) for n in (21, 38, 90)] == ["ventuno", "trentotto", "novanta"]
    assert [names["roman"](n) for n in (49, 94)] == ["XLIX", "XCIV"]
    output = capsys.readouterr().out
    assert "after roman" in output and "predicted drift" in output
    assert {path.name for path in Path("deltas").iterdir()} == {"italian", "roman"}


def test_the_snippets_on_training_run(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    snippet, narrow = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    sums = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(40)]
    names = {"model": text_model(), "dataset": datasets.Dataset.from_list(sums), "tokenizer": byte_tokenizer()}
    snippet = snippet.replace('output_dir="run"', f"output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False")
    exec(compile(snippet, "training.md", "exec"), names)
    assert names["trainer"].state.global_step == 4
    assert names["trainer"].selection_report.samples == 16
    pytest.importorskip("torchao")
    names["model"] = text_model()
    with torch.compiler.set_stance("force_eager"):  # otherwise torchao compiles for every shape
        narrow = narrow.replace('output_dir="run"', f"output_dir={str(tmp_path)!r}, use_cpu=True")
        exec(compile(narrow, "training.md", "exec"), names)
    assert {p.dtype for p in names["model"].parameters() if p.requires_grad} == {torch.bfloat16}


def test_the_snippets_on_selection_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "selection.md").read_text()
    text = [{"input_ids": batch["input_ids"]} for batch in token_batches(padding="right", seed=1)]
    names = {"base": text_model(), "dataloader": token_batches(), "general_text": text}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "selection.md", "exec"), names)
    assert Path("task.safetensors").exists() and names["report"].reference_samples == 8
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert all(f"`{name}`" in rows for name in CRITERIA)


def test_the_snippets_on_retention_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "retention.md").read_text()
    Path("reference.txt").write_text("One paragraph.\n\nAnother paragraph.")
    rows = [{key: value[0].tolist() for key, value in batch.items()} for batch in token_batches(sizes=(1,)) * 16]
    uneven = [{key: value[: 4 + n % 3] for key, value in row.items()} for n, row in enumerate(rows)]
    arguments = {"output_dir": "out", "max_steps": 5, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    names = {
        "dataset": uneven,
        "tokenizer": byte_tokenizer(),
        "training_arguments": transformers.TrainingArguments(**arguments),
        "dataloader": token_batches(),
        "general_text": token_batches(seed=1),
    }
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 4
    decays = []
    for snippet in snippets:
        names["base"] = text_model()
        if "predicted_drift" in snippet:
            names["model"] = get_peft_model(text_model(), FGGMConfig(preset="retain", task_type="CAUSAL_LM"))
            select_parameters(names["model"], token_batches(), reference=token_batches(seed=1), progress=False)
        exec(compile(snippet, "retention.md", "exec"), names)
        decays.append(names["trainer"].harm_decay if not decays else names["decay"])
    assert all(decays) and names["drift"][""] == 0


def test_the_variants_of_the_page_on_extending_select_train_merge_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = token_batches()
    base, names = text_model(), {"dataloader": batches, "another_base": text_model(), "__name__": "extending"}
    names["base"] = base
    page = (ROOT / "docs" / "extending.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 6
    registered = {
        CRITERIA: "fisher_over_weight",
        POLICIES: "above_median",
        GRANULARITIES: "tiles",
        METHODS: "embeddings",
        LAYER_TYPES: "InputMajorLinear",
    }
    try:
        for snippet in snippets:
            exec(compile(snippet, "extending.md", "exec", dont_inherit=True), names)
        for registry, name in registered.items():
            assert name in registry

        model, loaded, merged, tiles = names["model"], names["loaded"], names["merged"], names["Tiles"](8)
        saved = json.loads(Path("tiles/adapter_config.json").read_text())
        assert saved["granularity"] == {"granularity": "tiles", "size": 8}
        assert saved["threshold"] == {"policy": "above_median", "factor": 1.2, "scope": "layer"}
        assert loaded.peft_config["default"].granularity == tiles
        assert names["report"].criterion == "fisher_over_weight" and names["report"].density < 0.6
        for target in find_targets(loaded, "default").values():
            assert target.granularity == tiles and target.values.shape[1:] == (8, 8)
        with torch.no_grad():
            outputs = [m(**batches[0]).logits for m in (text_model(), loaded, merged)]
        assert not torch.equal(outputs[0], outputs[1])
        torch.testing.assert_close(outputs[1], outputs[2])
        with pytest.raises(ValueError, match=r"q_proj: granularity='tiles\(size=7\)' does not support .*\[64, 64\]"):
            get_peft_model(text_model(), FGGMConfig(granularity=names["Tiles"](7), target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"AboveMedian\.factor must be a number > 0, got 0"):
            names["AboveMedian"](0)

        method = make_method("embeddings", head=True)
        model = method.begin_task(method.prepare(text_model(), seed=0), [])
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            "model.embed_tokens.weight",
            "lm_head.weight",
        ]
        _adapts_an_input_major_layer(names["InputMajorLinear"])
    finally:
        for registry, name in registered.items():
            registry._entries.pop(name, None)


def _adapts_an_input_major_layer(layer_type):
    """The same selection, training and merge as for the ``nn.Linear`` that it replaces."""

    def adapted_model(replace):
        model = text_model()
        for layer in model.model.layers if replace else []:
            layer.mlp.up_proj = layer_type(layer.mlp.up_proj)
        model = get_peft_model(model, FGGMConfig(target_modules=["up_proj"], density=0.3))
        select_parameters(model, token_batches(), progress=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**token_batches()[0]).loss.backward()
        optimizer.step()
        return model

    model = adapted_model(replace=True)
    plain, replaced = find_targets(adapted_model(replace=False), "default"), find_targets(model, "default")
    for path, target in plain.items():
        assert torch.equal(replaced[path].indices, target.indices)
        torch.testing.assert_close(replaced[path].values, target.values)
        assert target.values.any()
    batch = token_batches()[0]
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected)


def test_the_snippets_on_sharing_run(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    text_model().save_pretrained("base-model")
    tuned = text_model()
    tuned.lm_head.weight.data[3:5] += 1
    tuned.save_pretrained("tuned-model")
    for seed, name in enumerate(("delta-a", "delta-b", "delta-c")):
        base = transformers.AutoModelForCausalLM.from_pretrained("base-model")
        adapter("row", seed, base=base, target_modules=["up_proj", "q_proj"]).save_pretrained(name)
    names: dict = {}
    page = (ROOT / "docs" / "sharing.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "sharing.md", "exec"), names)
    assert names["ledger"].tasks == ["delta-b", "delta-c"] and max(names["ranks"].values()) > 0
    assert Path("both").is_dir()
    assert names["published"].modules.keys() == SparseDelta.read("delta-a").modules.keys()
    assert hub.files("me/delta-a")["README.md"] == Path("delta-a/README.md").read_bytes()
    write_card(Path("delta-a"), SparseDelta.read("delta-a").config)
    data = ModelCard.load("delta-a/README.md").data
    assert data.eval_results[0].metric_value == 0.93 and "fggm" in data.tags


def test_the_snippets_on_choosing_run(capsys):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "choosing.md").read_text(), re.DOTALL)
    names = {"base": text_model(), "dataloader": token_batches(sizes=(8,) * 4)}
    for snippet in snippets:
        exec(compile(snippet, "choosing.md", "exec"), names)
    output = capsys.readouterr().out
    assert len(snippets) == 3 and "trainable values" in output
    assert names["report"].checks and names["report"].sample_passes == 32


def test_the_snippets_on_compatibility_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_model().save_pretrained("base")
    for seed, name in enumerate(("sums", "names")):
        config = FGGMConfig(criterion="random", density=0.1, seed=seed, init_weights=False)
        get_peft_model(text_model(), config).save_pretrained(f"tasks/{name}")
    samples = {key: value for key, value in token_batches((3,))[0].items() if key != "labels"}
    names = {"base": text_model(), "base_again": text_model(), "base_folder": "base", "three_samples": samples}
    names |= {"mixture": mixture("Mixtral"), "dataloader": token_batches((2,))}
    page = (ROOT / "docs" / "compatibility.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 5
    for snippet in snippets:
        exec(compile(snippet, "compatibility.md", "exec"), names)
    assert any("experts.down_proj.3" in path for path in find_targets(names["model"], "default"))
    assert names["mixed"].logits.shape[0] == 3 and Path("sums-as-lora/adapter_model.safetensors").exists()


@pytest.mark.parametrize("granularity", ["row", "column", "element"])
def test_the_reader_on_the_format_page_reads_saved_adapters(granularity, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = adapted(text_model(), granularity, criterion="random", density=0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    model.save_pretrained("delta", save_embedding_layers=False)
    names = {"base": text_model()}
    page = (ROOT / "docs" / "format.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "format.md", "exec"), names)
    assert "'is_zero': False" in capsys.readouterr().out
    for module, layer in fggm_layers(model, "default").items():
        delta = layer.delta("default")
        dense = torch.zeros(layer.weight_shape)
        delta.granularity.add_(dense, delta.indices, delta.values.detach())
        assert torch.equal(torch.from_numpy(names["read_dense"]("delta", module)), dense)
    again = fggm_layers(names["model"], "again")["model.layers.0.mlp.up_proj"]
    assert torch.equal(
        again.fggm_values["again"], fggm_layers(model, "default")["model.layers.0.mlp.up_proj"].fggm_values["default"]
    )


def test_the_stream_files_in_the_docs_are_valid(tmp_path):
    stream = re.search(r"```yaml\n(model:.*?)```", (ROOT / "docs" / "sequence.md").read_text(), re.DOTALL)[1]
    (tmp_path / "stream.yaml").write_text(stream)
    task = tmp_path / "data" / "intent"
    task.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (task / f"{split}.json").write_text('[{"prompt": "a", "answer": "b"}]')
    (tmp_path / "data" / "general.txt").write_text("a text")
    sequence = read_stream(tmp_path / "stream.yaml")
    assert [method.label for method in sequence.methods] == ["fggm", "sft", "fggm-5%"]
    assert len(sequence.task_orders()) == 3


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_the_targets_of_local_links_exist(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
