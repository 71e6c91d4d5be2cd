"""The report of a stream: its figures against manual computations, its files, and the page in a browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from made_up_runs import METHODS, TASKS, made_up_runs
from matplotlib.text import Text
from scipy import stats

from fggm_peft import plots
from fggm_peft.continual.measures import MEASURES, pareto_front, signed
from fggm_peft.continual.report import read_results, report_of, require_report_packages, write_report
from fggm_peft.continual.report.figures import pictures_of
from fggm_peft.continual.report.writing import page_of

HOSTILE = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--virtual-time-budget=5000", "--enable-logging=stderr"),
]


def run(label="a", rate=0.1, seed=0, order="given", op=0.5, **fields):
    """A result of two tasks with the given fields; all other fields have default values."""
    defaults = {
        "method": label,
        "tasks": ["one", "two"],
        "task_count": len(fields.get("tasks", ["one", "two"])),
        "R": [[op, None], [op, op]],
        "zero_shot": [0.1, 0.2],
        "op_mean": op,
        "diagonal": op,
        "bwt": -0.1,
        "forgetting": 0.1,
        "fwt": None,
        "general": None,
        "cost": {"training_seconds": 2.0, "parameters": 3},
    }
    named = {"label": label, "learning_rate": rate, "seed": seed, "order": order, "op": op}
    return {**defaults, **named, **fields}


def general(change):
    return {"general": change, "general_losses": [2.0, 2.0 + change]}


# --- figures -------------------------------------------------------------------------------------


def test_the_best_rate_has_the_highest_mean_op():
    runs = [run(rate=0.1, seed=s, op=op) for s, op in enumerate((0.4, 0.6))]
    runs += [run(rate=0.2, seed=s, op=op) for s, op in enumerate((0.9, 0.2))]
    (point,) = report_of(runs)["best"]["points"]
    assert point == {"label": "a", "method": "a", "learning_rate": 0.2, "rates": [0.1, 0.2], "runs": 2}


def test_a_tie_goes_to_the_smaller_rise_of_the_general_loss_then_to_the_smaller_rate():
    tied = [run(rate=r, op=0.1 + 0.2 if r == 0.1 else 0.3, **general(c)) for r, c in ((0.1, 0.5), (0.2, 0.4))]
    assert report_of(tied)["best"]["points"][0]["learning_rate"] == 0.2
    assert report_of([run(rate=r) for r in (0.3, 0.1, 0.2)])["best"]["points"][0]["learning_rate"] == 0.1
    unknown = [run(rate=0.1), run(rate=0.2, **general(9.0))]
    assert report_of(unknown)["best"]["points"][0]["learning_rate"] == 0.2


def test_differences_of_best_points_agree_with_a_paired_t_test():
    a, b = [0.5, 0.9, 0.1, 0.4], [0.4, 0.7, 0.0, 0.35]
    runs = [run("a", seed=s % 2, order=f"order{s // 2}", op=op) for s, op in enumerate(a)]
    runs += [run("b", seed=s % 2, order=f"order{s // 2}", op=op, rate=0.7) for s, op in enumerate(b)]
    runs += [run("b", rate=0.1, op=0.0), run("a", seed=7, op=0.2)]  # not its best rate; without a partner
    (entry,) = report_of(runs)["differences"]
    assert (entry["a"], entry["a_rate"], entry["b"], entry["b_rate"]) == ("a", 0.1, "b", 0.7)
    assert list(entry["measures"]) == list(MEASURES)
    found, expected = entry["measures"]["op"], stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(0.1125) and found["n"] == 4
    assert found["interval"] == pytest.approx(list(expected))
    assert found["is_clear"] and expected.low > 0
    assert entry["measures"]["bwt"]["mean"] == 0 and not entry["measures"]["bwt"]["is_clear"]
    assert entry["measures"]["general"] is None


def test_one_pair_has_no_interval_and_is_never_clear():
    report = report_of([run("a", op=0.9), run("b", op=0.1)])
    difference = report["differences"][0]["measures"]["op"]
    assert (difference["n"], difference["interval"], difference["is_clear"]) == (1, None, False)


def test_without_a_common_seed_and_order_there_is_no_difference():
    report = report_of([run("a", seed=0), run("b", seed=1)])
    assert set(report["differences"][0]["measures"].values()) == {None}


def test_the_fronts_use_means_over_runs_with_both_figures():
    runs = made_up_runs()
    found = report_of(runs)["pareto"]
    for name, cost in (("forgotten", lambda r: -r["bwt"]), ("harm", lambda r: r["general"])):
        groups: dict = {}
        for r in runs:
            if r["label"] != "multitask":
                groups.setdefault((r["label"], r["learning_rate"]), []).append(r)
        means = [
            tuple(sum(map(value, group)) / len(group) for value in (lambda r: r["diagonal"], cost))
            for group in groups.values()
        ]
        front = [list(groups)[position] for position in pareto_front(means)]
        points = {(p["label"], p["learning_rate"]): p["is_on_front"] for p in found[name]}
        assert list(points) == list(groups) and [key for key, is_on_front in points.items() if is_on_front] == front


def test_the_report_explains_its_measures():
    report = report_of([run()])
    assert list(report["measures"]) == list(MEASURES) and report["measures"]["op"] == "OP_T = mean_j R[T,j]"


def test_methods_with_more_rates_than_others_give_a_warning():
    equal = report_of([run(label, rate) for label in "ab" for rate in (0.1, 0.2)])
    assert equal["warnings"] == [] and "chosen on the test examples" in equal["best"]["rule"]
    own = report_of([run("a", 0.1), run("b", 0.2)])  # each method with the rate that was chosen for it
    assert own["warnings"] == [] and "one learning rate" in own["best"]["rule"]
    (warning,) = report_of([run("a", 0.1), run("a", 0.2), run("b", 0.1)])["warnings"]
    assert "Not equally tuned" in warning and "a: 0.1, 0.2; b: 0.1" in warning


def test_a_diverged_model_is_reported():
    runs = [run(seed=s, **general(change)) for s, change in enumerate((0.5, math.nan, math.inf))]
    report = report_of(runs)
    assert report["summary"][0]["general"]["n"] == 1 and report["summary"][0]["runs"] == 3
    assert "a at 0.1, seed 1, order given: the general loss is not finite" in report["warnings"][0]
    assert len(report["warnings"]) == 2
    assert "NaN" not in json.dumps(report, allow_nan=False)


def test_a_run_that_a_gate_stopped_has_costs_but_no_measures_over_fewer_tasks(tmp_path):
    few = {"tasks": ["one"], "task_count": 2, "R": [[0.99]], "zero_shot": [0.1], "bwt": None}
    stopped = run("a", seed=1, op=0.99, **few, **general(0.3))
    runs = [run("a", seed=0), stopped, run("b", seed=0, op=0.4), run("b", seed=1, op=0.4)]
    report = report_of(runs)
    entry = report["summary"][0]
    assert (entry["runs"], entry["op"]["n"], entry["op"]["mean"], entry["general"]) == (2, 1, 0.5, None)
    assert entry["cost"]["training_seconds"]["n"] == 2
    assert report["differences"][0]["measures"]["op"]["n"] == 1
    assert "a at 0.1, seed 1, order given: stopped before all 2 tasks" in report["warnings"][0]
    write_report(tmp_path, runs)
    write_report(tmp_path, [stopped, run("b")])  # no measure of a remains
    assert report_of([stopped, run("b")])["summary"][0]["op"] is None
    alone = report_of([stopped])
    assert alone["headline"].startswith("No run") and "stopped before all 2 tasks" in alone["warnings"][0]


def test_costs_are_summarised_and_missing_ones_are_left_out():
    runs = [run(seed=s, cost={"bytes": 10, "peak_memory": p}) for s, p in enumerate((2**30, 3 * 2**30))]
    cost = report_of([*runs, run(seed=2, cost={})])["summary"][0]["cost"]
    assert cost["bytes"]["n"] == 2 and cost["peak_memory"]["mean"] == 2 * 2**30


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Runs with several rates, seeds and orders; one method has no matrix."""
    methods = {name: METHODS[name] for name in ("fggm", "frozen", "multitask")}
    return made_up_runs({**methods, HOSTILE: METHODS["sft"], "$x$ a_b": METHODS["lora"]}, ["a_b", "$y$", HOSTILE])


ANOTHER_PROCESS = """
import json, pathlib, sys
from fggm_peft.continual.report import write_report
write_report(pathlib.Path(sys.argv[1]), json.load(sys.stdin))
"""


def test_the_same_results_give_the_same_bytes_in_three_files(small, tmp_path):
    write_report(tmp_path / "one", small)
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, input=json.dumps(small), text=True, check=True, env=environment)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 3
    assert json.loads((tmp_path / "one" / "report.json").read_text()) == report_of(small)


def folder_of(path, runs, stream):
    for number, result in enumerate(runs):
        file = path / "runs" / result["label"] / str(number) / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(result))
    (path / "stream.json").write_text(json.dumps(stream))
    return path


def test_a_report_of_several_folders_separates_their_runs(tmp_path):
    stream = {"training": {"epochs": 1}}
    a = folder_of(tmp_path / "a" / "runs", [run("sft", seed=s, op=0.5) for s in range(2)], stream)
    b = folder_of(tmp_path / "b" / "runs", [run("sft", seed=s, op=0.75) for s in range(2)] + [run("lora")], stream)
    assert read_results([str(a)]) == [run("sft", seed=s, op=0.5) for s in range(2)]
    report = report_of(read_results([a, b]))
    assert [entry["label"] for entry in report["summary"]] == [f"sft ({a})", "lora", f"sft ({b})"]
    pairs = {(d["a"], d["b"]): d["measures"]["op"] for d in report["differences"]}
    assert (pairs[f"sft ({a})", f"sft ({b})"]["mean"], pairs[f"sft ({a})", f"sft ({b})"]["n"]) == (-0.25, 2)


def test_folders_of_different_streams_give_a_warning_and_an_empty_folder_an_error(tmp_path):
    a, b = (folder_of(tmp_path / str(n), [run("sft")], {"training": {"epochs": n}}) for n in (1, 3))
    with pytest.warns(UserWarning, match=r"differ: training\.epochs: 1 instead of 3"):
        read_results([a, b])
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        read_results([tmp_path / "nothing"])


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.texts, self.links = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                self.links.append(value)
            assert not key.startswith("on"), (tag, key)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page(small):
    text = page_of(report_of(small))
    return text, Page(text)


def test_the_page_is_self_contained(page):
    text, parsed = page
    assert all(link.startswith("#") or link == "data:," for link in parsed.links)
    assert not re.search(r"url\((?!#)|@import|https?:", text)
    assert {"script", "iframe", "object", "embed", "img"}.isdisjoint(parsed.tags)


def test_labels_and_task_names_are_shown_literally(page):
    text, parsed = page
    assert "<script" not in text and "alert(1)" in text
    for name in (HOSTILE, "$x$ a_b", "a_b", "$y$"):
        assert name in parsed.texts
    assert any(t.startswith("<script>a") and "…" in t for t in parsed.texts)  # shortened in a figure


def test_figures_have_a_text_alternative_and_unique_ids(page):
    text, parsed = page
    pictures = re.findall(r"<svg [^>]*>", text)
    assert len(pictures) == 9
    assert all(re.search(r'role="img" aria-label="[^"]{8,}"', picture) for picture in pictures)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([\w-]+)\)", text)) <= set(parsed.ids)


def test_the_first_screen_has_a_sentence_a_figure_and_a_table(page):
    text, _ = page
    first = text[text.index("<body>") : text.index("<h2>")]
    assert (first.count("<h1>"), first.count("<svg"), first.count("<table>")) == (1, 1, 1)
    assert "After 3 tasks in sequence, fggm has a mean score of" in first


def test_the_headline_compares_the_highest_and_the_lowest_score():
    def headline(*runs):
        return report_of(runs)["headline"]

    bounds = [run("base", method="frozen", op=0.1), run("all", method="multitask", op=0.9)]
    one = [run("b", op=0.25, **general(0.5)), *bounds, run("a", op=0.75, **general(-0.25)), run("c")]
    assert headline(*one) == (
        "After 2 tasks in sequence, a has a mean score of 0.75, the highest, and b has 0.25, the lowest. The loss on "
        "general text changed by \u22120.25 and +0.50 nats. One pair of runs does not show whether this "
        "difference is due to chance."
    )
    several = [run(label, seed=s, op=op + s / 100) for s in range(2) for label, op in (("b", 0.25), ("a", 0.75))]
    assert headline(*several).endswith("The difference is clear (95 % interval +0.50 to +0.50).")
    noisy = [run("a", seed=s, op=op) for s, op in enumerate((0.5, 0.7))] + [run("b", seed=s) for s in range(2)]
    assert headline(*noisy).endswith("The difference is not clear (95 % interval \u22121.17 to +1.37).")
    assert headline(run("a", seed=0), run("b", seed=1)).endswith("These methods have no seed and order in common.")
    assert headline(run("a")) == "After 2 tasks in sequence, a has a mean score of 0.50."
    assert headline(*bounds).startswith("No run of a method")


def test_tables_omit_empty_columns(tmp_path):
    write_report(tmp_path, [run(label) for label in "ab"], page=False)
    text = (tmp_path / "report.md").read_text()
    assert "| training s |" in text and "peak memory" not in text and "| general text |" not in text


def test_the_style_supports_dark_mode_and_paper(page):
    text, _ = page
    assert "@media screen and (prefers-color-scheme: dark)" in text and "@media print" in text
    assert "break-inside: avoid" in text and "#1f2933" not in re.sub(r"(?s)<style>.*?</style>", "", text)


def test_the_page_states_the_rule_for_best_points_and_the_number_of_runs(page):
    text, _ = page
    assert "chosen on the test examples that are reported" in text and "OP_T = mean_j R[T,j]" in text
    assert "60 runs: 5 methods, 3 tasks, 2 learning rates, 3 seeds and 2 orders." in text


@pytest.mark.parametrize(
    "runs",
    [
        [run()],
        [run(tasks=["one"], R=[[0.5]], zero_shot=[0.1], bwt=None, forgetting=None, op_mean=0.5)],
        [run(label, cost={}, **general(0.1)) for label in "ab"],
        [run(R=[[0.5, 0.6]], diagonal=None, bwt=None, forgetting=None, op_mean=None)],
        [run(order="reversed"), run("b", order="given")],
    ],
    ids=["one run", "one task", "no cost", "only all tasks at once", "no order in common"],
)
def test_a_report_is_written_if_parts_are_missing(runs, tmp_path):
    write_report(tmp_path, runs)
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_the_report_shows_what_gates_did():
    gate = [{"task": "two", "earlier": "one", "score": 0.4, "needed": 0.45, "action": "rolled <b>back"}]
    report = report_of([run(gate=gate), run("b")])
    assert "after two, one scored 0.400 instead of 0.450: rolled <b>back." in report["warnings"][0]
    assert "rolled &lt;b&gt;back" in page_of(report)


def test_markdown_cells_cannot_break_their_table(tmp_path):
    write_report(tmp_path, [run("a|b\n# c <i>", seed=s) for s in range(2)], page=False)
    text = (tmp_path / "report.md").read_text()
    assert "a\\|b \\# c \\<i\\>" in text and not (tmp_path / "report.html").exists()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(not line.startswith("# c") for line in text.splitlines()) and len(rows) == 9


def test_control_characters_do_not_break_a_report(tmp_path):
    write_report(tmp_path, [run("a\x01b", seed=s) for s in range(2)])
    assert "a\ufffdb" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", [["matplotlib"], ["jinja2", "matplotlib"]])
def test_a_missing_package_is_named_with_its_extra(missing, monkeypatch):
    require_report_packages()
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"needs {' and '.join(missing)}: pip install 'fggm-peft\\[continual\\]'"):
        require_report_packages()


@pytest.fixture(scope="module")
def large_page():
    """The page of 12 methods, 8 tasks, 3 seeds, 2 orders and 2 learning rates."""
    return page_of(report_of(made_up_runs()))


def test_a_page_of_144_runs_is_smaller_than_three_megabytes(large_page):
    assert len(large_page.encode()) < 3e6 and all(task in large_page for task in TASKS)


def labels_of_front(count):
    """The boxes of the labels in the first figure, and its frame."""
    runs = [run(f"method-{n}", bwt=-0.04 * n, diagonal=0.5 + 0.01 * (n % 3)) for n in range(count)]
    figures = []

    def keep(figure, alt):
        figures.append(figure)
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "to_svg", keep)
        pictures_of(report_of([*runs, run("corner", bwt=-1.0, diagonal=1.0)]))
    figures[0].draw_without_rendering()
    (axes,) = figures[0].axes
    return [Text.get_window_extent(text) for text in axes.texts], axes.get_window_extent()


def test_labels_of_points_do_not_cover_each_other_or_leave_the_plot():
    boxes, frame = labels_of_front(10)
    assert len(boxes) == 11
    frame = frame.padded(0.1)  # for rounding
    assert all(frame.fully_containsx(x) for box in boxes for x in (box.x0, box.x1))
    assert all(frame.fully_containsy(y) for box in boxes for y in (box.y0, box.y1))
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


# --- in a browser --------------------------------------------------------------------------------

CHECK = """<body>
<iframe id=page style="border:0;width:{width}px;height:4000px" srcdoc="{page}"></iframe>
<pre id=out></pre>
<script>
page.onload = () => {{
  const root = page.contentDocument.documentElement;
  const smallest = Math.min(...[...root.querySelectorAll("figure svg text")].map(
    t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a || 99));
  const outside = [...root.querySelectorAll("figure, h1, h2, p, .box")].filter(
    e => e.getBoundingClientRect().right > {width} + 0.5).length;
  out.textContent = JSON.stringify({{overflow: root.scrollWidth - root.clientWidth, outside, smallest,
    figures: root.querySelectorAll("figure svg").length}});
}};
</script>"""


def in_browser(page: str, width: int, folder):
    """The layout of the page at this width in a browser, and the messages of its console."""
    text = CHECK.format(width=width, page=page.replace("&", "&amp;").replace('"', "&quot;"))
    (folder / "check.html").write_text(text, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder}/check.html"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="out">(\{.*?\})</pre>', result.stdout)
    assert found, result.stderr[-2000:]
    return json.loads(found[1]), [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("kind", ["usual", "long names"])
def test_a_phone_shows_the_page_without_scrolling_sideways(kind, small, large_page, tmp_path):
    tasks = ["t" * 90, "two", "three"]
    matrix = {"R": [[0.5] * 3] * 3, "zero_shot": [0.5] * 3}
    long = [run("a" * 200, tasks=tasks, order="o" * 300, seed=s, **matrix) for s in range(2)]
    pages = {
        "usual": lambda: large_page,
        "long names": lambda: page_of(report_of([*long, *small])),
    }
    found, messages = in_browser(pages[kind](), 375, tmp_path)
    assert messages == []
    assert (found["overflow"], found["outside"]) == (0, 0)
    assert found["figures"] >= 3 and found["smallest"] >= 8


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_browser_check_detects_problems(tmp_path):
    page = (
        "<p style='width: 900px'>wide</p><figure><svg><text font-size='3'>x</text></svg></figure><script>oh()</script>"
    )
    found, messages = in_browser(page, 375, tmp_path)
    assert found["overflow"] > 0 and found["outside"] == 1 and found["smallest"] == 3
    assert "oh is not defined" in messages[0]


@pytest.mark.parametrize(("value", "text"), [(-0.001, "+0.00"), (0.0, "+0.00"), (-0.006, "\u22120.01"), (1.2, "+1.20")])
def test_a_change_that_rounds_to_zero_has_no_minus(value, text):
    assert signed(value) == text
