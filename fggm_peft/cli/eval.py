"""``fggm eval``: evaluates the base model and adapters on the answers of a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Optional

import typer

from .options import BaseOptions, BatchSize, Data, DataOptions
from .output import Result, require_adapter, table


def run(
    base: BaseOptions,
    data_options: DataOptions,
    data: Data,
    adapter: Annotated[
        Optional[list[str]],
        typer.Option("--adapter", "-a", help="Folder or Hub id of an adapter. Repeat it to compare several."),
    ] = None,
    batch_size: BatchSize = 8,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also generate the answers greedily and count exact matches.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a generated answer.")] = 64,
) -> Result:
    """Evaluate MODEL, and each adapter on it, on the answers of DATA.

    Loss (in nats), perplexity and accuracy are those of the answers' tokens, given the true tokens before them. They
    do not depend on the batch size.
    """
    adapters = adapter or []
    for name in adapters:
        require_adapter(name)
    from peft import PeftModel

    from ..training.evaluation import AnswerScores, exact_match, score_answers

    examples = data_options.examples(data, base.base().load_tokenizer(), data_options.split or "test")
    model = base.base().load()

    def evaluate(model, name: str) -> AnswerScores:
        scores = score_answers(model, examples, batch_size, f"Evaluating {name}")
        if not generate:
            return scores
        match = exact_match(model, examples, batch_size, max_new_tokens, description=f"Generating with {name}")
        return replace(scores, exact_match=match)

    scores = {"base": evaluate(model, "base")}
    for name in adapters:
        adapted = PeftModel.from_pretrained(model, name)
        scores[name] = evaluate(adapted, name)
        model = adapted.unload()
    results = [{"adapter": None if name == "base" else name, **score.to_dict()} for name, score in scores.items()]
    headings = ["adapter", "loss", "perplexity", "token accuracy", *(["exact match"] if generate else [])]
    rows = [
        [name, f"{score.loss:.4f}", f"{score.perplexity:.3f}", f"{score.accuracy:.1%}"]
        + ([] if score.exact_match is None else [f"{score.exact_match:.1%}"])
        for name, score in scores.items()
    ]
    title = f"{base.model} on {data}: {scores['base'].samples:,} samples, {scores['base'].tokens:,} answer tokens"
    return Result({"model": base.model, "data": data, "results": results}, table(title, headings, rows))
