"""The course of events: load, teach each method the sequence, check the deltas, report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from base_model import BaseModel, load_base_model
from evaluation import Encoder, answer_logits
from learning import Course, Run, Snapshot, delta_folder, learn_sequence
from methods import METHODS
from peft import PeftModel
from picture import draw
from reading import read_results
from report import print_tables, write_results
from rich.console import Console
from rich.rule import Rule
from tasks import make_general_text, make_tasks
from torch import nn
from transformers.utils.logging import disable_progress_bar


def run_demo(arguments: argparse.Namespace) -> None:
    """Run everything that the command line asks for."""
    console, started = Console(), time.perf_counter()
    if not console.is_terminal:
        console.width = 110  # a log file or a pipe has no width of its own
    disable_progress_bar()  # of loading; the demo has its own
    arguments.output.mkdir(parents=True, exist_ok=True)

    console.print(Rule("FGGM beside plain fine-tuning"))
    base = load_base_model(arguments.model, arguments.quantize)
    course = make_course(base, arguments.seed, arguments.quick)
    introduce(console, base, course)

    console.print("\nScoring the base model on all tasks, before any training ...")
    start = course.snapshot(base.fresh())
    runs = []
    for name in arguments.methods:
        run = run_method(console, name, base, course, start, arguments.output)
        runs += [run] if run is not None else []
    if not runs:
        raise SystemExit("No method is left to run.")

    console.print()
    print_tables(console, runs, course)
    reading = read_results(runs, course)
    console.print(Rule("Reading"))
    console.print(reading, highlight=False)

    settings = vars(arguments) | {
        "output": str(arguments.output),
        "model": base.name,
        "dtype": str(base.dense.dtype),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - started,
    }
    draw(arguments.output / "picture.png", runs, course, base.name)
    write_results(arguments.output / "results.json", runs, settings, reading)
    console.print(Rule())
    console.print(
        f"{settings['seconds']:.0f} s in all. Picture, results.json and deltas are in {arguments.output}/",
        highlight=False,
    )


def make_course(base: BaseModel, seed: int, quick: bool) -> Course:
    """The tasks and how they are taught, at full size or just large enough to run."""
    train_size, test_size, general_size, batch_size = (12, 6, 4, 4) if quick else (160, 48, 32, 8)
    return Course(
        tasks=make_tasks(train_size, test_size, seed),
        general=make_general_text(general_size, seed),
        encoder=Encoder(base.tokenizer),
        batch_size=batch_size,
        seed=seed,
    )


def introduce(console: Console, base: BaseModel, course: Course) -> None:
    """Say in plain words what is about to happen."""
    number_format = base.quantize or str(base.dense.dtype).removeprefix("torch.")
    console.print(f"Model: {base.name} in {number_format}, {torch.get_num_threads()} threads.")
    console.print("Tasks, learned one after another:")
    for position, task in enumerate(course.tasks, start=1):
        size = f"{len(task.train)} training and {len(task.test)} test examples"
        console.print(f"  {position} [bold]{task.name}[/bold]: {task.description} ({size})")
    console.print(
        f"General text, never trained on: {len(course.general)} paragraphs of Python's language "
        "reference. Its loss shows what learning does to everything else."
    )


def run_method(
    console: Console, name: str, base: BaseModel, course: Course, start: Snapshot, output: Path
) -> Run | None:
    """Run one method from the base model; ``None`` where it cannot run on this base."""
    method = METHODS[name]
    if base.quantize and method.needs_dense_weights:
        console.print(
            f"\n[bold]{method.label}[/bold] is left out: the weights of a {base.quantize} model "
            "are integers without gradients, so they cannot be fine-tuned. FGGM's values lie "
            "beside them and can."
        )
        return None
    console.print(f"\n[bold]{method.label}[/bold], learning rate {method.learning_rate:g} ({method.why_this_rate})")
    run, model = learn_sequence(base.fresh(), method, course, start, output)
    if name == "fggm":
        check_deltas(console, base, model, course, output)
    return run


@torch.no_grad()
def check_deltas(console: Console, base: BaseModel, final: nn.Module, course: Course, output: Path) -> None:
    """Load the deltas from disk onto a fresh base, one on another: it must be the final model."""
    rebuilt = base.fresh()
    for position, task in enumerate(course.tasks, start=1):
        folder = delta_folder(output, position, task)
        rebuilt = PeftModel.from_pretrained(rebuilt, folder).merge_and_unload()
    batch = course.encoder.collate(course.tasks[0].test[:8])
    ours, theirs = (answer_logits(model.eval(), batch)[0] for model in (final, rebuilt))
    difference = (ours - theirs).abs().max().item()
    if difference > 1e-6:
        raise RuntimeError(
            f"the deltas in {output / 'deltas'} do not rebuild the trained model: "
            f"logits differ by up to {difference:.2e}"
        )
    console.print(
        f"  Checked: the {len(course.tasks)} deltas in {output / 'deltas'}, loaded from disk onto "
        f"a fresh base, give the trained model's logits (largest difference {difference:g})."
    )
