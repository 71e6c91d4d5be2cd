"""``fggm eval``: evaluates the base model and adapters on the answers of a task."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace

from .options import add_base, add_batch_size, add_data, base_model, positive, read_task
from .output import Result, require_adapter, table


def add_options(parser: ArgumentParser) -> None:
    add_base(parser)
    add_data(parser, split="test")
    text = "Folder or Hub id of an adapter. Repeat it to compare several."
    parser.add_argument("--adapter", "-a", action="append", default=[], help=text)
    add_batch_size(parser)
    text = "Also generate the answers greedily and count exact matches."
    parser.add_argument("--generate", action="store_true", help=text)
    text = "Maximum length of a generated answer (default: %(default)s)."
    parser.add_argument("--max-new-tokens", type=positive, default=64, help=text)


def run(args: Namespace) -> Result:
    """Evaluate MODEL, and each adapter on it, on the answers of DATA.

    Loss (in nats), perplexity and accuracy are those of the answers' tokens, given the true tokens before them. They
    do not depend on the batch size.
    """
    for name in args.adapter:
        require_adapter(name)
    from peft import PeftModel

    from ..training.evaluation import AnswerScores, exact_match, score_answers

    examples = read_task(args, args.data, base_model(args).load_tokenizer())
    model = base_model(args).load()

    def evaluate(model, name: str) -> AnswerScores:
        scores = score_answers(model, examples, args.batch_size, f"Evaluating {name}")
        if not args.generate:
            return scores
        description = f"Generating with {name}"
        match = exact_match(model, examples, args.batch_size, args.max_new_tokens, description=description)
        return replace(scores, exact_match=match)

    scores: list[tuple[str | None, AnswerScores]] = [(None, evaluate(model, "the base"))]
    for name in args.adapter:
        adapted = PeftModel.from_pretrained(model, name)
        scores.append((name, evaluate(adapted, name)))
        model = adapted.unload()
    results = [{"adapter": name, **score.to_dict()} for name, score in scores]
    headings = ["adapter", "loss", "perplexity", "token accuracy", *(["exact match"] if args.generate else [])]
    rows = [
        [name or "(base)", f"{score.loss:.4f}", f"{score.perplexity:.3f}", f"{score.accuracy:.1%}"]
        + ([] if score.exact_match is None else [f"{score.exact_match:.1%}"])
        for name, score in scores
    ]
    title = f"{args.model} on {args.data}: {len(examples):,} samples, {scores[0][1].tokens:,} answer tokens"
    return {"model": args.model, "data": args.data, "results": results}, table(title, headings, rows)
