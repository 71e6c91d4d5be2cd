"""What training the values in bfloat16 costs and saves, beside float32 and beside 8-bit optimizer states.

A small Llama that reads bytes is trained on English (the topics of Python's help) and rounded to bfloat16; FGGM then
learns the standard library's source code, always with the same support and batches. For each way to store and update
the values, the script reports the loss on held-out source code, the projection of the values on those of the float32
run (relative to their norm), and the bytes of value, gradient and optimizer state per value, counted on the tensors.

Requires torchao. Kahan summation is measured only if optimi (torch-optimi) is installed.

python benchmarks/value_precision.py [--quick] [--steps N]
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data import topics

import bitsandbytes
import torch
import torchao.optim
from common import llama, show, write
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from fggm_peft import FGGMConfig, select_parameters

BYTES = 256
LENGTH, BATCH = 48, 8
MODULES = ("argparse", "ast", "asyncio.base_events", "datetime", "decimal", "difflib", "inspect", "typing")
SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda done: 1.0, "linear to 0": lambda done: 1 - done}

CASES = ((3e-4, "linear to 0"), (3e-3, "linear to 0"), (3e-4, "constant"))


class Float32Masters(torch.optim.AdamW):
    """AdamW on float32 copies of the values. After each step, the copies are rounded to the values."""

    def __init__(self, values: Iterable[nn.Parameter], lr: float):
        self.values = list(values)
        super().__init__([nn.Parameter(value.detach().float()) for value in self.values], lr=lr)

    @torch.no_grad()
    def step(self, closure=None):
        masters = self.param_groups[0]["params"]
        for master, value in zip(masters, self.values, strict=True):
            master.grad = value.grad.float()
        super().step(closure)
        for master, value in zip(masters, self.values, strict=True):
            master.grad = None
            value.copy_(master)


def adamw(**options) -> Callable:
    return lambda values, lr: torch.optim.AdamW(values, lr=lr, **options)


def stochastic(optimizer: type) -> Callable:
    return lambda values, lr: optimizer(values, lr=lr, weight_decay=0.01, bf16_stochastic_round=True)


def bitsandbytes_8bit(values, lr):
    return bitsandbytes.optim.AdamW8bit(values, lr=lr)


def kahan(values, lr):
    import optimi

    return optimi.AdamW(values, lr=lr, betas=(0.9, 0.999), eps=1e-8)


FLOAT32 = "float32, AdamW"
WAYS: dict[str, tuple[str, Callable]] = {
    FLOAT32: ("float32", adamw()),
    "float32, 8-bit AdamW of bitsandbytes": ("float32", bitsandbytes_8bit),
    "bfloat16 rounded to nearest, AdamW": ("bfloat16", adamw()),
    "bfloat16 rounded stochastically, AdamW of torchao": ("bfloat16", stochastic(torchao.optim._AdamW)),
    "bfloat16 rounded stochastically, 8-bit AdamW of torchao": ("bfloat16", stochastic(torchao.optim.AdamW8bit)),
    "bfloat16 with float32 masters, AdamW": ("bfloat16", Float32Masters),
}
if importlib.util.find_spec("optimi"):
    WAYS["bfloat16 with Kahan summation, AdamW of optimi"] = ("bfloat16", kahan)
OTHER_ORDER = "float32, AdamW, batches in another order"


def english() -> Tensor:
    return bytes_of("\n".join(topics.topics.values()))


def source_code() -> Tensor:
    modules = [importlib.import_module(name) for name in MODULES]
    return bytes_of("\n".join(Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in modules))


def bytes_of(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def batches(text: Tensor, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random pieces of the text."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        yield {"input_ids": ids, "labels": ids}


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor) -> float:
    model.eval()
    return sum(float(model(**batch).loss) for batch in batches(text, 20, seed=99)) / 20


def base_model(steps: int) -> nn.Module:
    """A model that was trained on English in float32 and then rounded."""
    model = llama(128, 2, vocab=BYTES)
    learn(model, torch.optim.AdamW(model.parameters(), lr=2e-3), english(), steps, SCHEDULES["linear to 0"], seed=1)
    return model.to(torch.bfloat16).requires_grad_(False)


def learn(model: nn.Module, optimizer, text: Tensor, steps: int, schedule: Callable, seed: int) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for batch in tqdm(batches(text, steps, seed), total=steps, leave=False, disable=None):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        for value in values:
            value.grad = None


def bytes_a_value(optimizer, values: list[nn.Parameter]) -> float:
    """Bytes per value of values, gradients and optimizer state."""
    count = sum(value.numel() for value in values)
    tensors = [t for t in tree_leaves(dict(optimizer.state)) if isinstance(t, Tensor)]
    tensors += optimizer.param_groups[0]["params"] if isinstance(optimizer, Float32Masters) else []
    unique = {tensor.data_ptr(): tensor.nbytes for whole in tensors for tensor in _parts(whole)}
    return 2 * values[0].element_size() + sum(unique.values()) / count


def _parts(tensor: Tensor) -> list[Tensor]:
    """A tensor, or the tensors that a torchao tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def run(base: nn.Module, way: str, lr: float, schedule: Callable, texts: dict[str, Tensor], steps: int, seed: int):
    dtype, make_optimizer = WAYS[way]
    torch.manual_seed(0)
    config = FGGMConfig(density=0.3, num_samples=64, training_dtype=dtype)
    model = get_peft_model(copy.deepcopy(base), config)
    select_parameters(model, list(batches(texts["train"], 8, seed=7)), progress=False)
    values = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(values, lr)
    learn(model, optimizer, texts["train"], steps, schedule, seed)
    return model, torch.cat([value.detach().float().flatten() for value in values]), bytes_a_value(optimizer, values)


def compare(base: nn.Module, lr: float, schedule: Callable, texts: dict[str, Tensor], steps: int) -> dict:
    rows: dict[str, dict[str, float]] = {}
    reference: Tensor | None = None
    for name, way, seed in [*((name, name, 2) for name in WAYS), (OTHER_ORDER, FLOAT32, 3)]:
        model, moved, size = run(base, way, lr, schedule, texts, steps, seed)
        reference = moved if reference is None else reference
        rows[name] = {
            "held_out_loss": held_out_loss(model, texts["test"]),
            "movement_kept": float(moved @ reference / reference.square().sum()),
            "cosine": float(torch.cosine_similarity(moved, reference, dim=0)),
            "bytes_a_value": size,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only one case, with few steps")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    steps = 40 if arguments.quick else arguments.steps
    torch.compiler.set_stance("force_eager")  # otherwise torchao compiles a kernel for every shape
    code = source_code()
    cut = len(code) * 9 // 10
    texts = {"train": code[:cut], "test": code[cut:]}
    base = base_model(2 * steps)
    before = held_out_loss(base, texts["test"])
    results: dict[str, dict] = {"untuned": {"held_out_loss": before}, "steps": steps}  # type: ignore[dict-item]
    for lr, schedule in CASES[:1] if arguments.quick else CASES:
        case = f"lr {lr:g}, {schedule}"
        results[case] = compare(base, lr, SCHEDULES[schedule], texts, steps)
        show(f"{case}; untuned: {before:.3f}", results[case])
        if not arguments.quick:
            write("value_precision", results)


if __name__ == "__main__":
    main()
