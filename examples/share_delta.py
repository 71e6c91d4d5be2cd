"""Trains deltas of three tasks, and shows what can be done with finished deltas.

    python examples/share_delta.py --output shared

The script creates a tiny model and trains it on three tasks. It saves and compares the deltas, loads one of them onto
the base, and exports it as a LoRA adapter that does not need fggm_peft. It merges all three into one model and removes
one again. The result is bit for bit the model with the other two.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fggm_peft import FGGMConfig, Ledger, export_lora, overlap, select_parameters

TASKS = ("counting up", "counting down", "repeating")
STEPS = {"counting up": 1, "counting down": -1, "repeating": 0}
SYMBOLS, LENGTH = 32, 12


def base_model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=SYMBOLS, **sizes)).to(torch.bfloat16)


def batches(task: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Sequences of numbers modulo 32 that go up, go down or stay."""
    generator = torch.Generator().manual_seed(len(task))
    starts = torch.randint(SYMBOLS, (count, 8, 1), generator=generator)
    numbers = (starts + STEPS[task] * torch.arange(LENGTH)) % SYMBOLS
    return [{"input_ids": rows, "labels": rows.clone()} for rows in numbers]


def learn(base: PreTrainedModel, task: str, folder: Path) -> float:
    """Select and train an adapter for the task, and save it; returns the last loss."""
    config = FGGMConfig(density=0.2, granularity="row", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    data = batches(task)
    select_parameters(model, data, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(40):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    model.unload()
    return loss.item()


@torch.no_grad()
def loss_of(model, task: str) -> float:
    return sum(float(model.eval()(**batch).loss) for batch in batches(task)) / len(batches(task))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="a new folder")
    output = parser.parse_args().output

    base = base_model()
    base.save_pretrained(output / "base")
    folders = {task: output / "deltas" / task.replace(" ", "-") for task in TASKS}
    for task, folder in folders.items():
        before = loss_of(base_model(), task)
        print(f"{task}: loss {before:.2f} before, {learn(base_model(), task, folder):.2f} after training")

    print("\nOverlap of the supports:")
    for a, b in combinations(folders, 2):
        print(f"{a}, {b}: {overlap(folders[a], folders[b])}")

    # anyone with the same base can load a delta
    theirs = PeftModel.from_pretrained(base_model(), folders["counting up"])
    print(f"\nloaded elsewhere: loss {loss_of(theirs, 'counting up'):.2f}")

    # or serve it in an engine that supports only LoRA
    ranks = export_lora(theirs, output / "lora")
    print(f"exact LoRA of rank {max(ranks.values())}, written to {output / 'lora'}")

    # merge all three into one model, then remove one
    ledger = Ledger(output / "ledger")
    for folder in folders.values():
        ledger.add(folder.name, folder)
    model = base_model()
    ledger.apply(model)
    print(f"\nmerged: {', '.join(ledger.tasks)}")
    ledger.rollback("counting-down", model)
    print("removed counting-down")
    expected = base_model()
    Ledger(output / "ledger").apply(expected)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    print(f"bit for bit the model without it: {same}")


if __name__ == "__main__":
    main()
