"""Noise levels of block-wise denoising: how often each is trained, and which block owns it.

A network of B blocks is read as one denoiser (DiffusionBlocks, arXiv 2506.14202): block 1, the
first layers, owns the highest noise, block B the lowest. A level is whatever measures noise: sigma
of EDM (z = y + sigma eps), time of a flow (z = (1 - t) y + t eps), or the time of masked diffusion.
A *law* says how often each level is trained; its mass m(level) runs from 0 at the lowest level to 1
at the highest.

Equations: edges m^-1(i / B), i = 0..B, ascending; block b owns the levels between edges B-b and
B-b+1. Overlap gamma widens a range [lo, hi] by gamma times its length in the law's own coordinate
(log sigma, time, masked share), within [low, high]. A level is m^-1(u), u uniform between the
masses of the ends of a range. The grid of an inference has T levels evenly spaced in mass, from 1
to 0.

All of it in float64: sigma spans 4.6 decades and the normal law's inverse needs every digit near 1.
Source: arXiv 2506.14202, sections 3.3 and App. C, E; EDM, arXiv 2206.00364; logit-normal times,
arXiv 2403.03206.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError

Spacing = Literal["equal", "uniform", "log"]
SPACINGS = ("equal", "uniform", "log")
_ROUNDING = 1e-6
"""Relative: how far a level that went through float32 may lie outside of the law's ends."""


class Law(ABC):
    """How often each level is trained. low, high: its ends, which are exact."""

    kind: ClassVar[str]
    low: float
    high: float

    @abstractmethod
    def raw_mass(self, level: Tensor) -> Tensor:
        """Cumulative probability before it is cut to [low, high]; float64 in and out."""

    @abstractmethod
    def raw_level(self, mass: Tensor) -> Tensor:
        """The inverse of `raw_mass`."""

    @abstractmethod
    def stretch(self, level: float) -> float:
        """The coordinate that overlap is measured in."""

    @abstractmethod
    def unstretch(self, place: float) -> float:
        """The inverse of `stretch`."""

    def _ends(self) -> tuple[float, float]:
        ends = self.raw_mass(torch.tensor([self.low, self.high], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def mass(self, level: Tensor) -> Tensor:
        """Share of the training that is at this level or below; float64, any shape."""
        first, last = self._ends()
        return ((self.raw_mass(level.double()) - first) / (last - first)).clamp(0.0, 1.0)

    def level(self, mass: Tensor) -> Tensor:
        """The level of a mass in [0, 1]; float64, never outside [low, high]."""
        first, last = self._ends()
        return self.raw_level(first + mass.double() * (last - first)).clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogNormal(Law):
    """EDM: ln sigma is normal with this mean and deviation, cut to [low, high]."""

    kind: ClassVar[str] = "sigma"
    mean: float = -1.2
    std: float = 1.2
    low: float = 0.002
    high: float = 80.0

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf and 0 < self.std < math.inf):
            raise ConfigError(
                f"noise levels from {self.low} to {self.high} with deviation {self.std}",
                expected="0 < low < high, and a deviation above 0",
            )

    def raw_mass(self, level: Tensor) -> Tensor:
        return torch.special.ndtr((level.log() - self.mean) / self.std)

    def raw_level(self, mass: Tensor) -> Tensor:
        return (self.mean + self.std * torch.special.ndtri(mass)).exp()

    def stretch(self, level: float) -> float:
        return math.log(level)

    def unstretch(self, place: float) -> float:
        return math.exp(place)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowTime(Law):
    """Time of a flow, 0 = data, 1 = noise: uniform, or logit-normal where a deviation is given."""

    kind: ClassVar[str] = "time"
    mean: float = 0.0
    std: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1 or (self.std is not None and self.std <= 0):
            raise ConfigError(
                f"flow times from {self.low} to {self.high} with deviation {self.std}",
                expected="0 <= low < high <= 1, and a deviation above 0 or none",
            )

    def raw_mass(self, level: Tensor) -> Tensor:
        if self.std is None:
            return level
        return torch.special.ndtr((torch.special.logit(level) - self.mean) / self.std)

    def raw_level(self, mass: Tensor) -> Tensor:
        if self.std is None:
            return mass
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(mass))

    def stretch(self, level: float) -> float:
        return level

    def unstretch(self, place: float) -> float:
        return place


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskTime(Law):
    """Time of masked diffusion, 0 = nothing masked, 1 = all. Its mass is the masked share
    1 - alpha(t), since the density of work is -alpha'(t) (arXiv 2406.04329; 2506.14202 App. D)."""

    kind: ClassVar[str] = "mask"
    alpha: Literal["linear", "cosine"] = "linear"
    """Share of tokens not yet masked: 1 - t, or 1 - cos(pi/2 (1 - t))."""
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha not in ("linear", "cosine") or not 0 <= self.low < self.high <= 1:
            raise ConfigError(
                f"mask times from {self.low} to {self.high}, alpha = {self.alpha!r}",
                expected="0 <= low < high <= 1, and linear or cosine",
            )

    def raw_mass(self, level: Tensor) -> Tensor:
        return level if self.alpha == "linear" else (math.pi / 2 * (1 - level)).cos()

    def raw_level(self, mass: Tensor) -> Tensor:
        return mass if self.alpha == "linear" else 1 - mass.acos() * (2 / math.pi)

    def stretch(self, level: float) -> float:
        return float(self.raw_mass(torch.tensor(level, dtype=torch.float64)))

    def unstretch(self, place: float) -> float:
        place = min(1.0, max(0.0, place))
        return float(self.raw_level(torch.tensor(place, dtype=torch.float64)))


LAWS: dict[str, type[Law]] = {law.kind: law for law in (LogNormal, FlowTime, MaskTime)}


@dataclass(frozen=True, slots=True)
class Partition:
    """Which block owns which levels. Blocks are numbered 1..B; block 1 has the highest noise.

    edges: B + 1 levels, ascending.  overlap: how far a block's training reaches into its
    neighbours' ranges, as a share of its own; inference does not.
    """

    law: Law
    edges: tuple[float, ...]
    overlap: float = 0.0

    def __post_init__(self) -> None:
        edges = self.edges
        ascending = all(a < b for a, b in itertools.pairwise(edges))
        if (
            len(edges) < 2
            or not ascending
            or (edges[0], edges[-1]) != (self.law.low, self.law.high)
        ):
            raise ConfigError(
                f"noise levels divided at {list(edges)}",
                expected=f"edges that ascend from {self.law.low} to {self.law.high}",
            )
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap = {self.overlap}", expected="a share from 0 to below 1")

    @property
    def blocks(self) -> int:
        """B."""
        return len(self.edges) - 1

    def range(self, block: int) -> tuple[float, float]:
        """(lowest, highest) level that a block owns."""
        self.check_block(block)
        place = self.blocks - block
        return self.edges[place], self.edges[place + 1]

    def trained_range(self, block: int) -> tuple[float, float]:
        """The same, widened by the overlap."""
        law = self.law
        low, high = self.range(block)
        if not self.overlap:
            return low, high
        first, last = law.stretch(low), law.stretch(high)
        more = self.overlap * (last - first)
        return (
            law.low if low == law.low else max(law.low, law.unstretch(first - more)),
            law.high if high == law.high else min(law.high, law.unstretch(last + more)),
        )

    def sample(
        self, block: int, count: int, generator: torch.Generator, *, even: bool = False
    ) -> Tensor:
        """Levels to train a block at, (count,), float64, on the generator's device: the law, cut
        to the block's widened range.

        even: the draws lie evenly in mass from a random place on, round and round; each by itself
        is drawn as ever, and a mean over them is less noisy (arXiv 2107.00630, I.1).
        """
        low, high = self.trained_range(block)
        first, last = self.law.mass(torch.tensor([low, high], dtype=torch.float64)).tolist()
        kind: Any = {"dtype": torch.float64, "device": generator.device}
        u = torch.rand(1 if even else count, generator=generator, **kind)
        if even:
            u = (torch.arange(count, **kind) / count + u) % 1
        return self.law.level(first + u * (last - first)).clamp(low, high)

    def route(self, level: Tensor) -> Tensor:
        """The block (1..B) of every level, int64, any shape. An edge belongs to the block below
        it, which is the one that a step from there down goes through.

        ConfigError for a level outside of the law's ends.
        """
        low, high = self.law.low, self.law.high
        slack = _ROUNDING * max(abs(low), abs(high))
        wrong = ~((level >= low * (1 - _ROUNDING) - _tiny(low)) & (level <= high + slack))
        if bool(wrong.any()):
            raise ConfigError(
                f"a noise level of {float(level[wrong].reshape(-1)[0]):g}",
                expected=f"{low:g} to {high:g}, which is what the blocks were trained for",
            )
        # Both sides as float32: an edge is itself whatever it was rounded to on the way here.
        edges = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=level.device).float()
        return self.blocks - torch.bucketize(level.float(), edges)

    def grid(self, steps: int | None, *, first: float | None = None) -> list[float]:
        """`steps` levels to call the denoiser at, descending from `first` (the highest, if not
        given) to the lowest, evenly spaced in mass. None: one more than there are blocks; from
        the highest down these are the edges, so that each block answers where it takes over."""
        if steps is None and first is None:
            return list(reversed(self.edges))
        if steps is None:
            steps = self.blocks + 1
        if steps < 2:
            raise ConfigError(f"{steps} steps", expected="2 or more: the first and the last level")
        start = self.law.high if first is None else first
        self.route(torch.tensor([start], dtype=torch.float64))
        top = float(self.law.mass(torch.tensor(start, dtype=torch.float64)))
        levels = self.law.level(top * torch.linspace(1, 0, steps, dtype=torch.float64)).tolist()
        return [start, *levels[1:-1], self.law.low]

    def check_block(self, block: int) -> None:
        """ConfigError unless there is a block of that number."""
        if isinstance(block, bool) or block not in range(1, self.blocks + 1):
            raise ConfigError(f"block {block}", expected=f"1 to {self.blocks}")

    def to_json(self) -> dict[str, Any]:
        """As plain data, from which `from_json` makes an equal partition."""
        law = {"kind": self.law.kind, **asdict(self.law)}  # type: ignore[call-overload]
        return {"law": law, "edges": list(self.edges), "overlap": self.overlap}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Partition":
        """The partition that `to_json` gave. ConfigError for anything else."""
        try:
            settings = dict(data["law"])
            law = LAWS[settings.pop("kind")](**settings)
            return cls(law, tuple(map(float, data["edges"])), float(data["overlap"]))
        except (LookupError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"a division of noise levels that cannot be read ({error})",
                expected="law, edges and overlap",
            ) from None


def _tiny(low: float) -> float:
    return 0.0 if low else 1e-12


def partition(
    law: Law, blocks: int, *, spacing: Spacing = "equal", overlap: float = 0.0
) -> Partition:
    """The law's levels, divided among B blocks.

    spacing: "equal" shares of the training; "uniform" in the level; "log" in its logarithm.
    ConfigError for B < 1, and for "log" where levels begin at 0.
    """
    if blocks < 1:
        raise ConfigError(f"{blocks} blocks", expected="1 or more")
    parts = torch.arange(1, blocks, dtype=torch.float64) / blocks
    if spacing == "equal":
        inner = law.level(parts)
    elif spacing == "uniform":
        inner = law.low + parts * (law.high - law.low)
    elif spacing == "log" and law.low > 0:
        inner = (math.log(law.low) + parts * math.log(law.high / law.low)).exp()
    else:
        wanted = [name for name in SPACINGS if name != "log" or law.low > 0]
        raise ConfigError(f"spacing = {spacing!r}", expected=f"one of {', '.join(wanted)}")
    # Twelve digits: what machines compute differently must not tell their blocks apart.
    edges = (float(f"{edge:.12g}") for edge in inner.tolist())
    return Partition(law, (law.low, *edges, law.high), overlap)


# ---- twins -------------------------------------------------------------------------------------


def sigma_edges_ref(law: LogNormal, blocks: int) -> list[float]:
    """Twin of `partition` for sigma: the paper's equations with Python's own normal law."""
    normal = NormalDist(law.mean, law.std)
    first, last = normal.cdf(math.log(law.low)), normal.cdf(math.log(law.high))
    return [
        math.exp(normal.inv_cdf(first + i / blocks * (last - first))) for i in range(blocks + 1)
    ]


def sigma_range_ref(edges: Sequence[float], block: int, overlap: float) -> tuple[float, float]:
    """Twin of `Partition.trained_range` for sigma: the factor (hi / lo)^gamma of App. C."""
    low, high = edges[-block - 1], edges[-block]
    factor = (high / low) ** overlap
    return max(edges[0], low / factor), min(edges[-1], high * factor)


def route_ref(edges: Sequence[float], level: float) -> int:
    """Twin of `Partition.route`: the ranges one after the other, from the lowest noise up."""
    blocks = len(edges) - 1
    for place in range(blocks):
        if level <= edges[place + 1]:
            return blocks - place
    raise ValueError(level)
