"""Commands print their result to standard output and, to standard error, only what concerns the user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command_line import fggm, succeed
from streams import settings, write_stream

RUN_ALL = """
import json, sys
from fggm_peft.cli.app import run_program
for number, command in enumerate(json.loads(sys.argv[1])):
    for stream in (sys.stdout, sys.stderr):
        print(f"### {number}", file=stream, flush=True)
    try:
        run_program(command)
    except SystemExit as stop:
        print(f"exit {stop.code}", file=sys.stderr, flush=True)
"""
SAVED = r"Saved to OUT/{}\b"
COMMANDS = {
    # the arguments: (patterns of lines in standard output, standard error with # for numbers)
    "select model --data data -o OUT/selected --num-samples 8 --density 0.2": (
        [
            "criterion fisher, 8 samples",
            SAVED.format("selected"),
            "fggm train model --adapter",
        ],
        "",
    ),
    "select model --criterion random -o OUT/random": ([SAVED.format("random")], ""),
    "select model --dry-run": ["peak of a training step"],
    "train model --data data -a OUT/selected -o OUT/trained --max-steps 3 --logging-steps 1 --warmup-steps 0 "
    "--learning-rate 0.1 --eval-data data --eval-split test --eval-strategy steps --eval-steps 2 --save-steps 1": [
        SAVED.format("trained"),
        r"train loss .*\d\.\d+",
        r"steps .*3",
    ],
    "train model --data data -o OUT/both --max-steps 2 --num-samples 4 --save-steps 1": [SAVED.format("both")],
    "eval model --data data -a OUT/trained --generate --max-new-tokens 9": [r"\(base\)", "OUT/trained", "exact match"],
    "eval model --data data --generate --max-new-tokens 1": (
        ["exact match"],
        "fggm: warning: # of # answers can never match exactly: they have more than max_new_tokens=# tokens, or are "
        "truncated to max_length=#\n",
    ),
    "inspect OUT/trained --base model": ["OUT/trained is valid", "LoRA rank"],
    "overlap OUT/trained OUT/both --modules": ["Overlap of the supports"],
    "merge model -a OUT/trained -a OUT/both -o OUT/merged --ledger OUT/ledger": ["Saved to OUT/merged", "survived"],
    "rollback OUT/ledger both --model OUT/merged -o OUT/without": ["Removed both"],
    "diff model OUT/without -o OUT/difference": (
        ["Saved to OUT/difference"],
        "fggm: warning: # entries cannot be reproduced exactly by a float# delta; the nearest value is stored\n",
    ),
    "export OUT/trained --base model -o OUT/lora": ["Saved to OUT/lora", "rank"],
    "reference model --text text.txt -o OUT/reference": [r"\d+ tokens, .* Saved to OUT/reference"],
    "sequence stream.json -o OUT/sequence": ["Mean over runs", "frozen", "sft"],
    "doctor": [r"torch .*\d+\.\d+", r"device "],
    "eval model --data missing.json": ([], "fggm: error: no file or folder 'missing.json'\nexit #\n"),
    "select model --data empty.json -o OUT/x": (
        [],
        "fggm: error: row # of empty.json has an empty answer (answer); remove the row\nexit #\n",
    ),
}


@pytest.fixture(scope="module")
def printed(folder, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Arguments -> standard output and standard error, of commands in one process that is not a terminal."""
    work = tmp_path_factory.mktemp("work")
    for name in ("model", "data"):
        (work / name).symlink_to(folder / name)
    (work / "text.txt").write_text("One.\n\nTwo.")
    (work / "empty.json").write_text('[{"prompt": "a", "answer": " "}]')
    fields = settings(write_stream(work / "stream"), methods=["sft", "frozen"], seeds=[0])
    (work / "stream.json").write_text(json.dumps(fields))
    arguments = [line.replace("OUT", "out").split() for line in COMMANDS]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-c", RUN_ALL, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=work)
    assert result.returncode == 0, result.stderr
    parts = [re.split(r"^### \d+\n", text, flags=re.MULTILINE) for text in (result.stdout, result.stderr)]
    assert parts[0][0] == "" and parts[1][0] == ""  # importing prints nothing
    return dict(zip(COMMANDS, zip(parts[0][1:], parts[1][1:], strict=True), strict=True))


def test_every_command_is_run():
    from fggm_peft.cli.app import COMMANDS as NAMES

    assert {line.split()[0] for line in COMMANDS} == set(NAMES)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: " ".join(line.split()[:4]))
def test_a_command_prints_what_is_expected(line, printed):
    expected = COMMANDS[line]
    patterns, errors = expected if isinstance(expected, tuple) else (expected, "")
    out, err = printed[line]
    lines = [text for text in err.splitlines(keepends=True) if not text.startswith("{'")]  # the trainer's losses
    printed_errors = re.sub(r"\d[\d,.]*\d|\d", "#", "".join(lines))
    assert printed_errors == errors or (line.startswith("diff") and not printed_errors)  # rounding may be exact
    assert line.startswith("train") or err == "".join(lines)
    assert bool(out) == bool(patterns)
    for pattern in patterns:
        assert re.search(pattern.replace("OUT", "out"), out), out


# --- warnings ------------------------------------------------------------------------------------


def test_warnings_of_this_package_are_shown_once_and_others_are_not(folder, monkeypatch):
    from fggm_peft.training import evaluation

    score = evaluation.score_answers

    def warning(*arguments, **options):
        for category in (UserWarning, DeprecationWarning, FutureWarning):
            warnings.warn("of another module", category, stacklevel=1)
        exec("import warnings\nfor n in (1, 2): warnings.warn('two\\nlines', stacklevel=3)", vars(evaluation))
        torch.nn.functional.softmax(torch.zeros(2), dim=0)
        return score(*arguments, **options)

    monkeypatch.setattr(evaluation, "score_answers", warning)
    before = warnings.showwarning
    shown = fggm("eval", folder / "model", "--data", folder / "data")
    assert shown.code == 0 and shown.err == "fggm: warning: two lines\n"
    assert warnings.showwarning is before


def test_debug_shows_the_warnings_of_libraries(folder):
    with pytest.warns(FutureWarning, match="of a library"), pytest.MonkeyPatch.context() as patch:
        from fggm_peft.training import evaluation

        score = evaluation.score_answers
        patch.setattr(
            evaluation,
            "score_answers",
            lambda *a, **k: (warnings.warn("of a library", FutureWarning, stacklevel=1), score(*a, **k))[1],
        )
        succeed("eval", folder / "model", "--data", folder / "data", "--debug")


def test_missing_weights_of_a_checkpoint_are_shown(folder, tmp_path):
    """A base without its head would be evaluated with random weights."""
    from safetensors.torch import load_file, save_file

    for path in (folder / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    code = "from fggm_peft.cli import main; main()"
    command = [sys.executable, "-c", code, "eval", str(tmp_path), "--data", str(folder / "data")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=Path.cwd())
    assert result.returncode == 0 and "lm_head.weight" in result.stderr
