"""The commands of ``fggm``, on a small model in a folder, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional, Union, get_type_hints

import pytest
import torch
import yaml
from command_line import PAIRS, fail, fggm, succeed
from launching import TORCHRUN, output_of, start
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fggm_peft
from fggm_peft import FGGMConfig
from fggm_peft.cli.app import parser
from fggm_peft.cli.options import NOT_OPTIONS, FieldOptions, read_value, selection_config
from fggm_peft.cli.train import training_arguments


@cache
def commands() -> dict[str, ArgumentParser]:
    return parser()._subparsers._group_actions[0].choices


def options(command: str) -> dict:
    """Every option of a command and its action."""
    return {option: action for action in commands()[command]._actions for option in action.option_strings}


def config_of(*arguments: object) -> FGGMConfig:
    return selection_config(parser().parse_args(["select", "model", *map(str, arguments)]))


ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}

# --- select --------------------------------------------------------------------------------------


def test_select_saves_an_adapter_of_zero_values(folder, tmp_path):
    output = tmp_path / "new" / "adapter"
    found = succeed(
        *("select", folder / "model", "-d", folder / "data", "-o", output, "--granularity", "column"),
        *("--density", 0.25, "--target-modules", "q_proj", "--target-modules", "v_proj", "--num-samples", "all"),
    )
    assert {path.name for path in output.iterdir()} == ADAPTER_FILES
    assert [path.name for path in output.parent.iterdir()] == ["adapter"]  # no temporary folder is left
    tensors = load_file(output / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in tensors.items() if "values" in name)
    assert (found["granularity"], found["samples"], found["density"]) == ("column", 32, 0.25)
    assert found["bytes"] == (output / "adapter_model.safetensors").stat().st_size
    assert {module["name"].split(".")[-1] for module in found["modules"]} == {"q_proj", "v_proj"}


def test_select_prints_a_table(folder, tmp_path):
    result = fggm("select", folder / "model", "--data", folder / "data", "--output", tmp_path / "a")
    assert result.code == 0
    assert "trainable values" in result.out and "Saved to" in result.out


def test_select_with_a_criterion_that_needs_no_data(folder, tmp_path):
    found = succeed("select", folder / "model", "--criterion", "random", "--output", tmp_path / "a")
    assert found["samples"] == 0 and found["parameters"] > 0
    assert fggm("select", folder / "model", "--output", tmp_path / "b").code == 2


def test_select_of_a_4_bit_base(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    arguments = ("--data", folder / "data", "--output", tmp_path / "a", "--quantization", "4bit")
    assert succeed("select", folder / "model", *arguments)["samples"] in (8, 16, 32)
    found = succeed("eval", folder / "model", "--data", folder / "data", "--quantization", "4bit", "-a", tmp_path / "a")
    base, adapted = found["results"]
    assert base["loss"] == pytest.approx(adapted["loss"], rel=0.01)  # the adapter is zero


def test_a_dry_run_shows_the_cost_without_data(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("select", folder / "model", "--dry-run", "--batch-size", 4, "--max-length", 32)
    found = succeed(*arguments, "--budget", "lora:r=2", "--gradient-checkpointing")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    size = {"batch_size": 4, "sequence_length": 32, "checkpointing": True}
    expected = fggm_peft.estimate(base, FGGMConfig(budget="lora:r=2", task_type="CAUSAL_LM"), **size)
    assert found == {"model": str(folder / "model"), **expected.to_dict()}
    shown = fggm(*arguments, "--data", "not-read.json", "--threshold", '{"policy": "score_mass"}')
    assert shown.code == 0 and "peak of a training step" in shown.out and "depending on scores" in shown.out
    assert not list(tmp_path.iterdir())


def test_select_within_a_budget(folder, tmp_path):
    found = succeed(
        *("select", folder / "model", "--criterion", "random", "--output", tmp_path / "a", "--budget", "5%"),
        *("--max-units", 6),
    )
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["budget"] == "5%" and saved["resolved_budget"] - 96 < found["parameters"] <= saved["resolved_budget"]
    assert all(m["chosen"] <= 6 for m in found["modules"])
    assert "at least 64" in fail(
        "select", folder / "model", "--criterion", "random", "-o", tmp_path / "b", "--budget", 9
    )
    # an option replaces what the file says, with what belongs to it
    again = config_of("--config", tmp_path / "a" / "adapter_config.json", "--density", 0.2)
    assert (again.density, again.budget, again.resolved_budget) == (0.2, None, None)


# --- eval ----------------------------------------------------------------------------------------


def loss_by_hand(model, tokenizer, rows: list[dict]) -> tuple[float, int]:
    """Mean negative log-likelihood of the answers and the number of their tokens, one row at a time."""
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        log_probabilities = logits.log_softmax(-1)
        total -= sum(float(log_probabilities[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
        tokens += len(answer)
    return total / tokens, tokens


def test_eval_of_a_trained_adapter_agrees_with_a_loss_computed_by_hand(folder, trained):
    found = succeed("eval", folder / "model", "--adapter", trained, "--data", folder / "data")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    base, adapted = found["results"]
    loss, tokens = loss_by_hand(model, tokenizer, PAIRS[32:])
    assert (base["adapter"], base["samples"], base["tokens"]) == (None, 8, tokens)
    assert base["loss"] == pytest.approx(loss, abs=1e-5)
    assert base["perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-4)
    loss, _ = loss_by_hand(PeftModel.from_pretrained(model, str(trained)).eval(), tokenizer, PAIRS[32:])
    assert adapted["adapter"] == str(trained)
    assert adapted["loss"] == pytest.approx(loss, abs=1e-5)
    assert adapted["loss"] < base["loss"] - 0.1


@pytest.mark.parametrize("size", [1, 3, 8])
def test_eval_does_not_depend_on_the_batch_size(size, folder, trained, tmp_path):
    rows = [{"prompt": "a" * n, "answer": "b" * (9 - n)} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("eval", folder / "model", "--data", tmp_path / "rows.jsonl", "--adapter", trained, "--generate")
    arguments += ("--max-new-tokens", 6)
    together = succeed(*arguments, "--batch-size", 5)["results"]
    for one, other in zip(together, succeed(*arguments, "--batch-size", size)["results"], strict=True):
        assert one.pop("loss") == pytest.approx(other.pop("loss"), abs=1e-6)
        assert one.pop("perplexity") == pytest.approx(other.pop("perplexity"), rel=1e-5)
        assert one == other


def test_generated_answers_are_counted_when_they_match(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = tokenizer("zzz", return_tensors="pt")
    # with as many new tokens as this, the model writes this and no end token
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 3:]
    rows = [{"prompt": "zzz", "answer": tokenizer.decode(written)}, {"prompt": "a longer prompt", "answer": "no"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = succeed(
        "eval", folder / "model", "--data", tmp_path / "rows.json", "--generate", "--max-new-tokens", len(written)
    )
    assert found["results"][0]["exact_match"] == 0.5


def test_eval_prints_one_row_for_the_base_and_each_adapter(folder, selected, trained):
    arguments = ("--data", folder / "data", "-a", selected, "-a", trained, "--limit", 3)
    found = succeed("eval", folder / "model", *arguments)
    assert [row["adapter"] for row in found["results"]] == [None, str(selected), str(trained)]
    assert [row["samples"] for row in found["results"]] == [3, 3, 3]
    assert found["results"][0]["loss"] == found["results"][1]["loss"] != found["results"][2]["loss"]
    assert "exact match" not in fggm("eval", folder / "model", *arguments).out


# --- train ---------------------------------------------------------------------------------------


def test_train_selects_first_and_evaluates_afterwards(folder, tmp_path):
    found = succeed(
        *("train", folder / "model", "--data", folder / "data", "--output", tmp_path / "out", "--density", 0.1),
        *("--max-steps", 2, "--num-samples", 16, "--eval-data", folder / "data", "--eval-split", "test"),
        *("--learning-rate", 1e-2, "--weight-decay", 0.1),
    )
    assert found["selection"]["samples"] == 16 and found["steps"] == 2
    assert found["density"] == pytest.approx(0.1, abs=0.02) and found["regret"] is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == ADAPTER_FILES | {"checkpoints"}
    adapted = succeed("eval", folder / "model", "--data", folder / "data", "-a", tmp_path / "out")["results"][1]
    assert found["evaluation"]["loss"] == pytest.approx(adapted["loss"], abs=1e-6)


def test_train_prints_a_short_table(folder, selected, tmp_path):
    arguments = ("--data", folder / "data", "--adapter", selected, "--output", tmp_path / "out", "--max-steps", 1)
    result = fggm("train", folder / "model", *arguments)
    assert result.code == 0
    assert "train loss" in result.out and "parameters" in result.out and "train_runtime" not in result.out


def test_a_resumed_run_ends_like_an_uninterrupted_run(folder, tmp_path):
    arguments = ("train", folder / "model", "--data", folder / "data", "--output", tmp_path / "out", "--max-steps", 4)
    arguments += ("--save-steps", 2, "--learning-rate", 1e-2)
    succeed(*arguments)
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for path in (tmp_path / "out" / "checkpoints" / "checkpoint-4").iterdir():
        path.unlink()  # as if it had been killed while it wrote
    for name in ADAPTER_FILES:
        (tmp_path / "out" / name).unlink()
    assert "not empty" in fail(*arguments)
    found = succeed(*arguments, "--resume")
    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found["steps"] == 4 and found["selection"] is None
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_keeps_the_selection_and_rejects_another(folder, tmp_path):
    arguments = ("train", folder / "model", "--data", folder / "data", "--output", tmp_path / "out")
    arguments += ("--save-steps", 1)
    succeed(*arguments, "--max-steps", 1, "--density", 0.1)
    message = fail(*arguments, "--max-steps", 2, "--resume", "--density", 0.9)
    assert "density=0.1, not 0.9" in message and "--overwrite" in message
    succeed(*arguments, "--max-steps", 2, "--resume")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["density"] == 0.1


def test_train_on_a_4_bit_base(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = succeed(
        *("train", folder / "model", "--data", folder / "data", "--output", tmp_path / "out", "--quantization", "4bit"),
        *("--max-steps", 2, "--num-samples", 16, "--gradient-checkpointing"),
    )
    assert found["steps"] == 2


def test_overwrite_removes_the_earlier_run(folder, selected, tmp_path):
    arguments = ("train", folder / "model", "--data", folder / "data", "--output", tmp_path, "--adapter", selected)
    stale = tmp_path / "checkpoints" / "checkpoint-99"
    stale.mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty" in fail(*arguments, "--max-steps", 1)
    succeed(*arguments, "--max-steps", 1, "--overwrite")
    assert not stale.exists() and (tmp_path / "notes.txt").read_text() == "mine"


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_every_field_of_the_config_can_come_from_a_file(suffix, tmp_path):
    fields = {"layers_to_transform": [1], "density_pattern": {"q_proj": 0.1}, "density": 0.4, "seed": 3}
    write = json.dumps if suffix == ".json" else yaml.safe_dump
    (tmp_path / f"config{suffix}").write_text(write(fields))
    config = config_of("--config", tmp_path / f"config{suffix}", "--seed", 5)
    assert (config.layers_to_transform, config.density_pattern, config.density) == ([1], {"q_proj": 0.1}, 0.4)
    assert config.seed == 5  # an option goes before the file
    threshold = config_of("--config", tmp_path / f"config{suffix}", "--threshold", '{"policy": "score_mass"}')
    assert threshold.policy() == fggm_peft.ScoreMass()


def test_an_adapter_config_can_be_reused(selected):
    config = config_of("--config", selected / "adapter_config.json")
    saved = FGGMConfig.from_pretrained(selected)
    assert config.density == saved.density == 0.2 and config.target_modules == saved.target_modules
    assert config.selection is None and config.base_model_name_or_path is None


def test_every_field_of_the_config_is_an_option():
    names = {field.name for field in fields(FGGMConfig) if field.init} - NOT_OPTIONS
    expected = {"--" + name.replace("_", "-") for name in names}
    for command in ("select", "train"):
        assert expected <= options(command).keys()


def test_every_field_of_training_arguments_is_an_option(tmp_path):
    assert options("train")["--adam-beta1"].help == SUPPRESS != options("train")["--learning-rate"].help
    given = ["--adam-beta1", "0.8", "--lr-scheduler-kwargs", '{"num_cycles": 2}', "--batch-size", "3"]
    command = ["train", "model", "--data", "d", "--output", str(tmp_path), *given]
    arguments = training_arguments(parser().parse_args(command), FGGMConfig(seed=7))
    assert (arguments.adam_beta1, arguments.lr_scheduler_kwargs, arguments.seed) == (0.8, {"num_cycles": 2}, 7)
    assert (arguments.per_device_eval_batch_size, arguments.learning_rate, arguments.save_total_limit) == (3, 2e-4, 2)
    retain = FGGMConfig(preset="retain")
    assert training_arguments(parser().parse_args(command), retain).learning_rate == 1.6e-3
    given = parser().parse_args([*command, "--learning-rate", "1e-3"])
    assert training_arguments(given, retain).learning_rate == 1e-3


@dataclass
class Example:
    """A config with one field of each kind."""

    share: Optional[float] = field(default=0.5, metadata={"help": "First sentence. Second sentence."})
    count: Optional[Union[int, Literal["auto"]]] = field(default="auto", metadata={"help": "A number or auto."})
    size: Optional[Union[int, str]] = None
    policy: Union[dict, None] = None
    names: Optional[Union[list[str], str]] = None
    color: Literal["red", "blue"] = "red"
    shape: Optional[SimpleNamespace] = None
    is_on: bool = False
    written: int = field(default=0, init=False)


def test_the_usage_names_the_required_options():
    (commands,) = parser()._subparsers._group_actions
    usage = commands.choices["train"].format_usage()
    assert usage == "usage: fggm train MODEL --data DATA --output OUTPUT [OPTIONS]\n"


def test_shells_complete_choices_and_otherwise_file_names():
    (commands,) = parser()._subparsers._group_actions
    actions = {action.dest: action for action in commands.choices["export"]._actions}
    assert actions["to"].choices and not hasattr(actions["to"], "complete")
    assert actions["output"].complete["bash"] == "_shtab_compgen_files"


def test_options_come_from_the_fields_of_a_dataclass():
    assert read() == {}
    assert read("--share", "0.1", "--names", "a") == {"share": 0.1, "names": ["a"]}
    assert (read("--is-on"), read("--no-is-on")) == ({"is_on": True}, {"is_on": False})
    for unknown in ("--color", "--written"):
        with pytest.raises(SystemExit):
            read(unknown, "red")


def read(*arguments: str) -> dict:
    """The given fields of the example."""
    source, program = FieldOptions(Example, "example", skip={"color"}), ArgumentParser(exit_on_error=False)
    source.add_to(program)
    return source.given(program.parse_args(arguments))


@pytest.mark.parametrize(
    "name, given, value",
    [
        ("names", ["q_proj"], ["q_proj"]),
        ("names", ["q_proj,v_proj", "o_proj"], ["q_proj", "v_proj", "o_proj"]),
        ("names", ["all-linear"], "all-linear"),
        ("names", [r".*layers\.1\..*_proj"], r".*layers\.1\..*_proj"),
        ("count", "all", None),
        ("count", "auto", "auto"),
        ("count", "64", 64),
        ("size", "64", 64),
        ("size", "8GiB", "8GiB"),
        ("policy", '{"policy": "score_mass"}', {"policy": "score_mass"}),
        ("shape", "row", "row"),
        ("shape", '{"name": "row"}', {"name": "row"}),
        ("share", "0.25", 0.25),
        ("share", "1e-3", 0.001),
    ],
)
def test_the_text_of_an_option_is_read_as_its_fields_type(name, given, value):
    texts = given if isinstance(given, list) else [given]
    assert read(*(word for text in texts for word in (f"--{name}", text))) == {name: value}


@pytest.mark.parametrize("name, given", [("count", "some"), ("policy", "{"), ("policy", "3")])
def test_a_text_that_fits_no_type_is_wrong_usage(name, given):
    with pytest.raises(ArgumentTypeError, match="is not"):
        read_value(get_type_hints(Example)[name], given)


# --- errors --------------------------------------------------------------------------------------


def test_errors_are_one_line_and_say_what_to_do(folder, selected, tmp_path):
    model, data, out = folder / "model", folder / "data", tmp_path / "out"
    (tmp_path / "odd.json").write_text('[{"x": 1}]')
    (tmp_path / "config.json").write_text('{"densty": 1}')
    assert "no file or folder 'missing.json'" in fail("eval", model, "--data", "missing.json")
    assert "no folder '/missing'" in fail("eval", "/missing", "--data", data)
    assert "odd.json are x; expected messages" in fail("eval", model, "--data", tmp_path / "odd.json")
    assert "density must be in (0, 1]" in fail("select", model, "--data", data, "--output", out, "--density", 7)
    assert "not empty" in fail("select", model, "--data", data, "--output", selected)
    assert "is a file" in fail("select", model, "--data", data, "--output", tmp_path / "odd.json")
    assert "no adapter in" in fail("eval", model, "--data", data, "--adapter", data)
    assert "no field 'densty'" in fail(
        "select", model, "--data", data, "--output", out, "--config", tmp_path / "config.json"
    )
    assert "nothing to resume" in fail("train", model, "--data", data, "--output", out, "--resume")
    assert not out.exists()


@pytest.mark.parametrize("budget", ["150%", "0%", "5MiB", "lora:r=0", "-3", "plenty"])
def test_an_impossible_budget_is_rejected_before_the_model_is_loaded(budget, tmp_path):
    message = fail(
        "select", tmp_path / "no model", "--data", "none", "--output", tmp_path / "out", f"--budget={budget}"
    )
    assert " must be " in message and message.endswith((repr(budget), f" {budget}"))


def test_training_that_fails_before_its_first_checkpoint_leaves_no_folder(folder, tmp_path):
    arguments = ("train", folder / "model", "--data", folder / "data", "--output", tmp_path / "out")
    assert "score_memory=8 is too small" in fail(*arguments, "--score-memory", 8)
    assert not list(tmp_path.iterdir())


def test_a_base_that_does_not_exist_is_named(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError("nobody/nothing is not a local folder\nand is not a valid model identifier")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    message = fail("eval", "nobody/nothing", "--data", folder / "data")
    assert "cannot load 'nobody/nothing'" in message and "not a valid model identifier" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("select", "model"),
        ("train", "model", "--data", "d", "--output", "o", "--learning-rat", "1"),
        ("train", "model", "--data", "d", "--output", "o", "--adam-beta1", "x"),
        ("select", "model", "--data", "d", "--output", "o", "--threshold", "{"),
        ("select", "model", "--data", "d", "--output", "o", "--num-samples", "some"),
        ("eval", "model", "--data", "d", "--batch-size", "0"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fggm(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "usage: fggm" in result.err and "Traceback" not in result.err


def test_train_rejects_selection_options_for_a_selected_adapter(folder, selected, tmp_path):
    arguments = ("--data", folder / "data", "--output", tmp_path / "out", "--adapter", selected, "--density", 0.1)
    result = fggm("train", folder / "model", *arguments)
    assert result.code == 2 and "--density" in result.err


@pytest.mark.parametrize("option", ["--training-dtype", "--delta-dtype"])
def test_an_unknown_dtype_is_wrong_usage(option, tmp_path):
    result = fggm("select", "model", "--data", "d", "--output", tmp_path / "out", option, "int8")
    assert result.code == 2 and "'float32', 'bfloat16'" in " ".join(result.err.split())


def test_train_uses_the_dtypes_of_the_selected_adapter(folder, tmp_path):
    chosen, arguments = tmp_path / "chosen", ("--data", folder / "data", "--output", tmp_path / "out")
    dtypes = ("--training-dtype", "bfloat16", "--delta-dtype", "float16")
    succeed("select", folder / "model", "-o", chosen, "--criterion", "random", *dtypes)
    saved = json.loads((chosen / "adapter_config.json").read_text())
    assert (saved["training_dtype"], saved["delta_dtype"]) == ("bfloat16", "float16")
    succeed("train", folder / "model", *arguments, "--adapter", chosen, "--max-steps", 1)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["training_dtype"] == "bfloat16"
    assert value_dtypes(tmp_path / "out") == {torch.float16}


def test_delta_dtype_can_be_set_for_each_training(folder, selected, tmp_path):
    arguments = ("train", folder / "model", "--data", folder / "data", "--delta-dtype", "bfloat16")
    succeed(*arguments, "--output", tmp_path / "a", "--max-steps", 1, "--adapter", selected)
    assert value_dtypes(tmp_path / "a") == {torch.bfloat16}
    own = (*arguments, "--output", tmp_path / "b", "--density", 0.1, "--save-steps", 1)
    succeed(*own, "--max-steps", 1)
    succeed(*own, "--max-steps", 2, "--resume")
    assert value_dtypes(tmp_path / "b") == {torch.bfloat16}
    result = fggm(*arguments, "--output", tmp_path / "c", "--adapter", selected, "--training-dtype", "bfloat16")
    assert result.code == 2 and "--training-dtype" in result.err


def value_dtypes(folder: Path) -> set[torch.dtype]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {tensor.dtype for name, tensor in tensors.items() if name.endswith("values")}


def test_debug_shows_the_traceback(folder):
    with pytest.raises(ValueError, match="no file or folder"):
        fggm("eval", folder / "model", "--data", "missing.json", "--debug")


def test_an_interrupted_command_exits_with_130_and_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft.PeftModel.save_pretrained", interrupt)
    result = fggm("select", folder / "model", "--data", folder / "data", "--output", tmp_path / "out")
    assert result.code == 130
    assert not list(tmp_path.iterdir())


# --- the program ---------------------------------------------------------------------------------


def test_the_pages_name_options_that_exist():
    docs = Path(fggm_peft.__file__).parents[1] / "docs"
    page = "\n".join((docs / f"{name}.md").read_text() for name in ("cli", "sharing", "choosing", "format"))
    names = "|".join(name for name in commands() if name != "sequence")
    lines = re.findall(rf"^(?:.*\$\(which fggm\)|fggm) ({names}) (.*)$", page, re.MULTILINE)
    assert len(lines) > 16
    for command, line in lines:
        known = options(command).keys()
        used = {word for word in shlex.split(line, comments=True) if word.startswith("-")}
        assert used <= known, (command, used - known)


HELP_ONLY = """
import sys
from fggm_peft.cli import main
try:
    main()
finally:
    assert not {"datasets", "trl", "transformers.trainer", "matplotlib"} & sys.modules.keys()
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_loads_no_heavy_library(arguments):
    command = [sys.executable, "-W", "ignore", "-c", HELP_ONLY, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=offline())
    assert result.returncode == 0, result.stderr
    assert "fggm" in result.stdout


def test_the_installed_program_runs_and_keeps_standard_output_for_the_result(folder):
    command = [Path(sys.executable).with_name("fggm"), "eval", folder / "model", "--data", folder / "data", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=offline())
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["results"][0]["samples"] == 8


@pytest.mark.distributed
def test_two_processes_select_like_one(folder, selected, tmp_path):
    script = "from fggm_peft.cli import main; main()"
    (tmp_path / "fggm.py").write_text(script)
    command = [*TORCHRUN, tmp_path / "fggm.py", "select", folder / "model", "--data", folder / "data"]
    command += ["--output", tmp_path / "out", "--density", "0.2", "--batch-size", "3", "--json"]
    assert json.loads(output_of(start(*command, stderr=subprocess.PIPE)))["samples"] == 32
    one, two = (load_file(path / "adapter_model.safetensors") for path in (selected, tmp_path / "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_references_are_the_models_own_text_and_an_earlier_task(folder, tmp_path):
    """Selects columns by gain per harm, first against the model's own text, then against the first task."""
    common = ("--granularity", "column", "--density", 0.3, "--num-samples", 8)
    own = ("--criterion", "gain_per_harm", "--reference", "self")
    data, model = folder / "data", folder / "model"
    first = succeed("select", model, "--data", data, "--output", tmp_path / "first", "--save-scores", *own, *common)
    assert (first["samples"], first["reference_samples"]) == (8, 8)
    assert {path.name for path in (tmp_path / "first").iterdir()} == ADAPTER_FILES | {"fggm_scores.safetensors"}
    options = ("--criterion", "gain_per_harm", "--reference", tmp_path / "first", *common)
    train = ("--max-steps", 1, "--batch-size", 4)
    second = succeed("train", model, "--data", data, "--output", tmp_path / "second", *train, *options)
    assert second["selection"]["reference_samples"] == 0


def test_a_criterion_without_its_reference_is_rejected_before_the_model_is_loaded(tmp_path):
    line = fail("select", "no/model", "--data", "x", "--output", tmp_path / "out", "--criterion", "gain_per_harm")
    assert "Add --reference TEXT.txt" in line and not (tmp_path / "out").exists()


def test_the_preset_retains_a_text_or_saved_statistics(folder, tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("One paragraph.\n\nAnother paragraph.")
    saved = succeed("reference", folder / "model", "--text", text, "--output", tmp_path / "statistics")
    assert saved["tokens"] == len("One paragraph.") + len("Another paragraph.") + 2
    assert (tmp_path / "statistics" / "fggm_retention.safetensors").stat().st_size == saved["bytes"]
    base = ("train", folder / "model", "--data", folder / "data", "--preset", "retain", "--max-steps", 4)
    for name in ("prose.txt", "statistics"):
        output = tmp_path / f"delta-{name}"
        succeed(*base, "--reference", tmp_path / name, "--output", output, "--use-cpu")
        config = json.loads((output / "adapter_config.json").read_text())
        assert (config["harm_decay"], config["criterion"], config["density"]) == (80.0, "gain_under_decay", 0.3)
    trained = json.loads(
        fggm(*base, "--reference", tmp_path / "statistics", "-o", tmp_path / "again", "--use-cpu", "--json").out
    )
    assert 0 < trained["drift"] < 1 and trained["kl"] > 0
    selected = tmp_path / "selected"
    reference = ("--preset", "retain", "--reference", tmp_path / "statistics")
    succeed("select", folder / "model", "--data", folder / "data", *reference, "--output", selected)
    succeed(
        "train",
        folder / "model",
        "--data",
        folder / "data",
        "--adapter",
        selected,
        "--output",
        tmp_path / "both",
        "--max-steps",
        4,
        "--save-steps",
        4,
        "--logging-steps",
        1,
        "--lr-scheduler-type",
        "constant_with_warmup",
    )
    state = json.loads((tmp_path / "both" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert max(entry.get("learning_rate", 0) for entry in state["log_history"]) == 1.6e-3
    assert "harm_decay weighs the task against a reference" in fail(*base, "--output", tmp_path / "none", code=1)
    assert "is not empty" in fail("reference", folder / "model", "--text", text, "--output", tmp_path / "statistics")
