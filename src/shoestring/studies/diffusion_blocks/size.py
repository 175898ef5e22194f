"""How much of the study is run, and which arms it has."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["digits", "text", "photographs"]
PARTS: tuple[Part, ...] = ("digits", "text", "photographs")
ENDS, SHALLOW = "end to end", "end to end, a third of the layers"
LONG = "end to end, a third of the layers, three times as long"
RECOMPUTED, GREEDY = "end to end, recomputed", "greedy, 3 runs of layers"
TOTAL = "3 blocks, equal total"
UNIFORM, LOG = "3 blocks, even in sigma", "3 blocks, even in log sigma"
COUNTS = (2, 3, 4)


@dataclass(frozen=True, slots=True)
class Arm:
    """blocks: in which the layers are trained.  depth: the layers are divided by it.  share: of
    the steps, that each block makes.  spacing: of the edges.  kind: "blocks" (end to end is one
    block), "greedy", or "recomputed", which is only compared with end to end, not trained again."""

    name: str
    blocks: int = 1
    depth: int = 1
    share: float = 1.0
    spacing: Literal["equal", "uniform", "log"] = "equal"
    kind: Literal["blocks", "greedy", "recomputed"] = "blocks"


ARMS = {
    each.name: each for each in (
        Arm(ENDS), Arm(SHALLOW, depth=3), Arm(LONG, depth=3, share=3.0),
        Arm(RECOMPUTED, kind="recomputed"),
        *(Arm(f"{count} blocks", count) for count in COUNTS),
        Arm(TOTAL, 3, share=1 / 3), Arm(UNIFORM, 3, spacing="uniform"),
        Arm(LOG, 3, spacing="log"), Arm(GREEDY, 3, kind="greedy"),
    )
}  # fmt: skip
FIRST = (ENDS, SHALLOW, LONG, RECOMPUTED, *(f"{count} blocks" for count in COUNTS), UNIFORM)
"""Arms that all seeds have before the others begin: what most claims and the bars are about."""
_FEW = (ENDS, SHALLOW, LONG, "3 blocks", UNIFORM)
_NO_SIGMA = tuple(name for name in ARMS if name not in (UNIFORM, LOG))


@dataclass(frozen=True, slots=True)
class Size:
    """steps: updates of a block, by part; a part that is not there is not run.  arms: by part.
    lr: of digits, text and photographs.  text_bytes, held_bytes: of text, at most.
    drawn: digits an arm draws, in `calls` calls.  held: digits held out.  scored: held-out samples
    losses are taken of.  draws: levels for each text and part of the bound."""

    name: str
    steps: dict[str, int]
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0, 1, 2)
    layers: int = 12
    width: int = 64
    heads: int = 4
    condition: int = 48
    batch: int = 32
    texts: int = 16
    length: int = 64
    text_bytes: int = 6 << 20
    held_bytes: int = 256 << 10
    lr: tuple[float, float, float] = (6e-3, 4e-3, 6e-3)
    drawn: int = 1000
    calls: int = 12
    guidance: float = 2.0
    held: int = 1500
    scored: int = 512
    draws: int = 1
    epochs: int = 8
    source: str = "stdlib"
    paired: int = 12
    """Updates made plain and recomputed in turn, to compare their bits and seconds."""


FULL = Size(
    "full", {"digits": 700, "text": 400, "photographs": 400},
    {"digits": tuple(ARMS), "text": _NO_SIGMA, "photographs": _FEW},
)  # fmt: skip
QUICK = Size(
    "quick", {"digits": 250, "text": 120, "photographs": 120},
    {"digits": (ENDS, SHALLOW, LONG, RECOMPUTED, "3 blocks", UNIFORM), "text": (ENDS, SHALLOW,
     "3 blocks"), "photographs": (ENDS, "3 blocks")},
    seeds=(0,), drawn=500, scored=256, epochs=4,
)  # fmt: skip
TINY = Size(
    "tiny", {"digits": 2, "text": 2, "photographs": 2},
    {"digits": tuple(ARMS), "text": (ENDS, "3 blocks", GREEDY), "photographs": (ENDS,)},
    seeds=(0,), width=16, heads=2, condition=8, batch=4, texts=2, length=16, drawn=40, calls=4,
    held=40, scored=16, epochs=1, paired=2, text_bytes=1 << 16, held_bytes=1 << 12,
)  # fmt: skip
