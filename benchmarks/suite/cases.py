"""The cases of the suite: measurements and their settings. ``quick`` is a subset, ``full`` is everything."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A model, its batch, and its number of trainable values.

    Args:
        hidden, layers, vocabulary: of a Llama with the usual proportions.
        base: dtype or quantization of the weights.
        length, batch: tokens per sample, samples.
        density: trainable values over entries of the targeted weights.
        peers: also measure other libraries for per-sample gradients.
        checkpointing: steps with gradient checkpointing.
    """

    hidden: int = 512
    layers: int = 10
    vocabulary: int = 16000
    base: str = "float32"
    length: int = 128
    batch: int = 4
    density: float = 0.05
    peers: bool = False
    checkpointing: bool = False

    @property
    def parameters(self) -> int:
        width, heads = self.hidden, self.hidden // 64
        attention = 2 * width * width + 2 * width * max(1, width // 256) * (width // heads)
        feed_forward = 3 * width * (width * 8 // 3 // 64 * 64)
        return self.layers * (attention + feed_forward) + 2 * self.vocabulary * width

    @property
    def is_dense(self) -> bool:
        return self.base in ("float32", "bfloat16")

    def text(self) -> str:
        """The setting as text, a key of the result file."""
        size = f"{self.parameters / 1e6:.0f} M (hidden {self.hidden} × {self.layers} layers)"
        text = f"{size}, {self.base}, T {self.length}, batch {self.batch}, density {100 * self.density:g} %"
        return f"{text}, checkpointing" if self.checkpointing else text

    def as_figures(self) -> dict[str, Any]:
        return {**asdict(self), "parameters": self.parameters}


@dataclass(frozen=True)
class Case:
    measurement: str
    setting: Setting

    @property
    def key(self) -> str:
        return f"{self.measurement}: {self.setting.text()}"


SMALL = Setting(hidden=256, layers=8, vocabulary=8000)  # 9 M
MEDIUM = Setting()  # 44 M
LARGE = Setting(hidden=1024, layers=8, base="bfloat16")  # 0.12 G
LARGEST = Setting(hidden=1536, layers=16, base="bfloat16", batch=1)  # 0.45 G

IMPORT = Case("import", SMALL)


def quick() -> list[Case]:
    small = replace(SMALL, length=64)
    cases = [Case("training step", replace(small, density=density)) for density in (0.05, 0.3)]
    cases.append(Case("training step", replace(small, base="nf4")))
    cases.append(Case("decoding", replace(small, length=1, batch=1)))
    cases.append(Case("selection pass", replace(small, peers=True)))
    cases += [Case("harm decay", replace(small, length=128, density=0.3)), Case("adapter", small), IMPORT]
    return cases


def full() -> list[Case]:
    steps = [replace(MEDIUM, density=density) for density in (0.001, 0.01, 0.05, 0.3)]
    steps += [replace(MEDIUM, length=length, batch=batch) for length, batch in ((32, 8), (512, 1))]
    steps += [replace(MEDIUM, base=base) for base in ("bfloat16", "int8", "nf4")]
    steps += [SMALL, replace(LARGE, batch=2), replace(LARGE, batch=2, density=0.3), LARGEST]
    tokens = [MEDIUM, replace(MEDIUM, base="nf4"), LARGE]
    tokens = [replace(setting, length=1, batch=batch) for setting in tokens for batch in (1, 4)]
    passes = [replace(MEDIUM, length=length, batch=batch) for length, batch in ((32, 8), (512, 2))]
    passes += [replace(MEDIUM, peers=True), replace(LARGE, base="float32", batch=2), SMALL]
    decays = [replace(MEDIUM, density=density) for density in (0.1, 0.3)]
    decays.append(replace(LARGE, base="float32", density=0.3))
    files = [replace(MEDIUM, density=density) for density in (0.01, 0.05, 0.3)]
    files += [replace(LARGE, density=0.11), replace(LARGE, base="float32", density=0.11)]  # 10 M values
    files.append(LARGEST)
    listed = {"training step": steps, "decoding": tokens, "selection pass": passes}
    listed |= {"harm decay": decays, "adapter": files}
    return [Case(measurement, setting) for measurement, settings in listed.items() for setting in settings] + [IMPORT]
