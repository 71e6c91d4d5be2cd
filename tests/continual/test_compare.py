"""``fggm compare``: which runs are paired, what is said of their streams, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_up_runs import METHODS, TASKS, made_up_runs
from scipy import stats
from typer.testing import CliRunner

from fggm_peft.cli import app
from fggm_peft.continual.measures import Measures
from fggm_peft.continual.report import write_report
from fggm_peft.continual.report.comparison import NotComparableError, compare, read_source

STREAM = {"model": {"name": "m"}, "tasks": {"one": {"metric": "rouge"}}, "training": {"epochs": 1}, "order": ["one"]}
HOSTILE = "[/red]<script>alert(1)</script>"


def runs_of(*labels, **options):
    options.setdefault("tasks", TASKS[:3])
    return made_up_runs({label: METHODS.get(label, METHODS["sft"]) for label in labels}, **options)


def written(folder, runs, stream=STREAM):
    write_report(folder, runs, page=False)
    if stream is not None:
        (folder / "stream.json").write_text(json.dumps(stream))
    return str(folder)


def found_by(tmp_path, *sides):
    paths = [written(tmp_path / name, runs) for name, runs in zip("abc", sides, strict=False)]
    return compare([read_source(path) for path in paths])


def ttest(a, b):
    return list(stats.ttest_rel(a, b).confidence_interval(0.95))


def test_runs_of_the_same_label_rate_seed_and_order_are_paired(tmp_path):
    a, b = runs_of("fggm", "sft", "lora"), runs_of("sft", "fggm", seeds=(1, 0))
    for number, run in enumerate(b):
        run["op"] += 0.01 * (number % 5)
    found = found_by(tmp_path, a, b)
    assert [(e["a"]["label"], e["b"]["label"]) for e in found["differences"]] == [
        ("fggm", "fggm"),
        ("sft", "sft"),
        ("all labels", "all labels"),
    ]
    by_key = {(r["label"], r["learning_rate"], r["seed"], r["order"]): r for r in a}
    for entry, labels in zip(found["differences"], (["fggm"], ["sft"], ["fggm", "sft"]), strict=True):
        theirs = [r for r in b if r["label"] in labels]
        mine = [by_key[r["label"], r["learning_rate"], r["seed"], r["order"]] for r in theirs]
        difference = entry["measures"]["op"]
        assert entry["paired_by"] == ["label", "learning_rate", "seed", "order"]
        assert difference["n"] == len(theirs) == 8 * len(labels)
        assert difference["interval"] == pytest.approx(ttest([r["op"] for r in mine], [r["op"] for r in theirs]))
        assert entry["b"]["op"]["mean"] == pytest.approx(np.mean([r["op"] for r in theirs]))
        assert entry["a"]["op"]["n"] == 12 * len(labels)
        assert len(difference["unpaired"]) == 4 * len(labels)
        assert entry["measures"]["bwt"]["mean"] == 0 and not entry["measures"]["bwt"]["is_clear"]


def test_different_labels_are_paired_by_seed_and_order_at_their_best_rates(tmp_path):
    a, b = runs_of("fggm", "multitask"), runs_of("sft", rates=(1e-4, 3e-4, 1e-3))
    first, second = found_by(tmp_path, a, b)["differences"]

    def best(runs, label):
        groups: dict = {}
        for r in runs:
            if r["label"] == label:
                groups.setdefault(r["learning_rate"], {})[r["seed"], r["order"]] = r["op"]
        return max(groups.values(), key=lambda group: np.mean(list(group.values())))

    mine, theirs = best(a, "fggm"), best(b, "sft")
    assert first["paired_by"] == ["seed", "order"] and first["measures"]["op"]["n"] == 6
    assert first["measures"]["op"]["interval"] == pytest.approx(
        ttest([mine[key] for key in mine], [theirs[key] for key in mine])
    )
    assert second["measures"]["bwt"] is None and second["measures"]["op"]["n"] == 6


def test_an_order_is_its_tasks_and_not_its_name(tmp_path):
    a, b = runs_of("sft", orders=("given",)), runs_of("sft", orders=("given",), tasks=TASKS[2::-1])
    assert found_by(tmp_path, a, b)["differences"][0]["measures"]["op"] is None
    for run in b:
        run["order"] = "reversed"
    c = runs_of("sft", orders=("reversed",))
    assert found_by(tmp_path, [{**r, "order": "mine"} for r in c], b)["differences"][0]["measures"]["op"]["n"] == 6


def test_only_shared_tasks_are_measured_and_it_is_said(tmp_path):
    a, b = runs_of("sft", "multitask", tasks=TASKS[:4]), runs_of("sft", "multitask", tasks=TASKS[1:3])
    found = found_by(tmp_path, a, b)
    assert found["tasks"] == list(TASKS[1:3]) and "Not the same tasks" in found["warnings"][0]
    assert "C-STANCE, Py150" in found["warnings"][0]
    side = found["differences"][0]["a"]
    expected = []
    for run in (r for r in a if r["label"] == "sft"):
        at = [position for position, task in enumerate(run["tasks"]) if task in TASKS[1:3]]
        scores = np.array(run["R"], dtype=float)[np.ix_(at, at)]
        expected.append(Measures.of(scores, [run["zero_shot"][position] for position in at]))
    assert side["bwt"]["mean"] == pytest.approx(np.mean([m.backward_transfer for m in expected]))
    assert side["op"]["mean"] == pytest.approx(np.mean([m.final_op for m in expected]))
    assert side["general"] is None  # it comes after other tasks, too
    multitask = found["differences"][1]["a"]
    last = [[run["R"][0][run["tasks"].index(t)] for t in TASKS[1:3]] for run in a if run["label"] == "multitask"]
    assert multitask["op"]["mean"] == pytest.approx(np.mean(last))


def test_a_run_that_was_stopped_before_the_shared_tasks_counts_for_nothing(tmp_path):
    a, b = runs_of("sft", orders=("given",), rates=(1e-4,)), runs_of("sft", orders=("given",), tasks=TASKS[1:3])
    a[0] |= {"tasks": [TASKS[0]], "R": [[0.9]], "zero_shot": [0.1], "op": 0.9, "bwt": None}
    entry = found_by(tmp_path, a, b)["differences"][0]
    assert entry["a"]["op"]["n"] == 2 and entry["measures"]["op"]["n"] == 2


def test_different_tasks_are_refused(tmp_path):
    with pytest.raises(NotComparableError, match=r"different tasks.*C-STANCE.*Py150"):
        found_by(tmp_path, runs_of("sft", tasks=TASKS[:2]), runs_of("sft", tasks=TASKS[3:5]))


def test_what_differs_between_the_streams_is_said(tmp_path):
    runs = runs_of("frozen")
    other = {**STREAM, "model": {"name": "b" * 64}, "training": {"epochs": 3}}
    paths = [
        written(tmp_path / "a", runs),
        written(tmp_path / "b", runs, other),
        written(tmp_path / "c", runs, None),
        written(tmp_path / "d", runs),
    ]
    a, b, c, d = (read_source(path) for path in paths)
    differences = ['model.name: "m", there content bbbbbbbb', "training.epochs: 1, there 3"]
    found = compare([a, b])
    assert found["streams"][0]["differences"] == differences
    assert all(difference in found["warnings"][0] for difference in differences)
    assert "not known" in compare([a, c])["warnings"][0]
    assert compare([a, d])["warnings"] == []


def test_a_folder_whose_runs_are_not_all_finished_has_those_that_are(tmp_path):
    runs = runs_of("sft")
    for number, run in enumerate(runs[:3]):
        file = tmp_path / "runs" / "sft" / str(number) / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(run))
    assert read_source(str(tmp_path)).runs == runs[:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        ("{", "is not JSON"),
        ("[]", "has no list of runs"),
        ('{"runs": []}', "no finished run"),
        ('{"runs": [{"label": "a"}]}', "a run has no method, learning_rate"),
        ('{"runs": [1]}', "a run has no fields"),
    ],
)
def test_what_is_not_a_report_is_named(content, message, tmp_path):
    file = tmp_path / "report.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(NotComparableError, match=message):
        read_source(str(file))


def invoke(*arguments):
    return CliRunner().invoke(app.build(), ["compare", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_command_prints_tables_json_and_a_page(tmp_path):
    one = written(tmp_path / "one", runs_of("fggm", HOSTILE, seeds=(0, 1)))
    two = written(tmp_path / "two", runs_of("fggm", HOSTILE, seeds=(0, 1)), {**STREAM, "order": ["two"]})
    shown = invoke(one, two)
    assert shown.exit_code == 0, shown.output
    assert "order" in shown.stdout and "not clear" in shown.stdout and "[/red]" in shown.stdout

    result = invoke(one, two, "--json", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [side["runs"] for side in data["compared"]] == [16, 16]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and page.count("<svg") == 7
    assert invoke(one, two, "--output", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text() == page

    refused = invoke(one, two, "--output", tmp_path / "out")
    assert refused.exit_code == 1 and "--overwrite" in refused.stderr
    assert invoke(one, two, "--output", tmp_path / "out", "--overwrite").exit_code == 0


def test_one_folder_or_the_same_twice_is_refused(tmp_path):
    path = written(tmp_path / "one", runs_of("frozen"))
    for arguments in ([path], [path, path]):
        refused = invoke(*arguments)
        assert refused.exit_code == 1 and "2 to 26 different folders" in refused.stderr
