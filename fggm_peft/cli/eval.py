"""``fggm eval``: how well the base, and each adapter on it, answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .command import Result
from .options import BaseOptions, DataOptions
from .output import require_adapter

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.data import TokenizedExamples
    from ..training.evaluation import AnswerScores


def run(
    base: BaseOptions,
    data_options: DataOptions,
    data: Annotated[str, typer.Option("--data", "-d", help="A file, a folder or a Hub id.")],
    adapter: Annotated[
        Optional[list[str]],
        typer.Option("--adapter", "-a", help="Folder or Hub id of an adapter; repeat it to compare several."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Examples in one forward; the figures do not depend on it.")
    ] = 8,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also write the answers (greedily) and count the exact matches.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a written answer at most.")] = 64,
) -> Result:
    """Evaluate MODEL, and each adapter on it, on the answers of DATA.

    The loss (in nats), the perplexity and the accuracy are those of the answers' tokens, given the true tokens
    before them.
    """
    adapters = adapter or []
    for folder in adapters:
        require_adapter(folder)

    from peft import PeftModel

    tokenizer = base.base().load_tokenizer()
    examples = data_options.examples(data, data_options.split or "test", tokenizer)
    model = base.base().load()
    tokens_to_generate = max_new_tokens if generate else 0
    scores = {"base": _evaluate(model, examples, batch_size, tokens_to_generate, "base")}
    for folder in adapters:
        adapted = PeftModel.from_pretrained(model, folder)
        scores[folder] = _evaluate(adapted, examples, batch_size, tokens_to_generate, folder)
        model = adapted.unload()
    rows_of_json = [{"adapter": None if name == "base" else name, **score.to_dict()} for name, score in scores.items()]
    return Result({"model": base.model, "data": data, "results": rows_of_json}, _table(base.model, data, scores))


def _evaluate(
    model: Any, examples: TokenizedExamples, batch_size: int, tokens_to_generate: int, name: str
) -> AnswerScores:
    from dataclasses import replace

    from ..training.evaluation import exact_match, score_answers

    scores = score_answers(model, examples, batch_size, f"Evaluating {name}")
    if not tokens_to_generate:
        return scores
    match = exact_match(model, examples, batch_size, tokens_to_generate, description=f"Generating with {name}")
    return replace(scores, exact_match=match)


def _table(model: str, data: str, scores: dict[str, AnswerScores]) -> Table:
    from rich.table import Table

    first = next(iter(scores.values()))
    table = Table(title=f"{model} on {data}: {first.samples:,} samples, {first.tokens:,} answer tokens")
    table.add_column("adapter", overflow="fold")
    headings = ["loss", "perplexity", "token accuracy"] + (["exact match"] if first.exact_match is not None else [])
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, score in scores.items():
        cells = [f"{score.loss:.4f}", f"{score.perplexity:.3f}", f"{score.accuracy:.1%}"]
        cells += [] if score.exact_match is None else [f"{score.exact_match:.1%}"]
        table.add_row(name, *cells)
    return table
