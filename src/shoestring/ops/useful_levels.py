"""Edges between blocks at equal shares of useful work, instead of equal shares of the training.

What a block can learn at a noise level is the *gap* there: by how much one who sees the input is
better than one who sees z alone. Where z gives the answer away, as below sigma* with targets of
few directions, there is nothing to learn and a block that owns such levels is wasted; where both
know nothing there is nothing either.

Equations: with m the mass of a level and g(m) >= 0 the gap, edges are where the integral of g from
0 to m is i / B of the whole, i = 0..B. A gap that is the same everywhere gives equal shares.
Levels below sigma* = 1 / sqrt(2 ln V) are dropped where targets are V rows of length 1 in
directions of their own (the noise that is left along one row is then as long as the largest of V).

Source: none that we know of. sigma*: the largest of V standard normal values is about
sqrt(2 ln V).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from .noise_levels import FlowTime, Law, LogNormal, Partition
from .preconditioning import edm_weight

# K levels, V rows of a table, E eigenvalues

LEVELS = 256
"""Levels at which a gap is asked for: the middles of so many equal shares of the training."""
DIGITS = 4
"""Of an edge. What machines sum up differently must not tell their blocks apart."""


def free_below(rows: int) -> float:
    """sigma*: below it the nearest of V rows of length 1 is the right one, mostly."""
    if rows < 2:
        raise ConfigError(f"a table of {rows} rows", expected="2 or more")
    return 1 / math.sqrt(2 * math.log(rows))


def without_free(law: LogNormal, rows: int) -> LogNormal:
    """The law without the levels at which V rows of length 1 are told apart by z alone."""
    low = float(f"{free_below(rows):.{DIGITS}g}")
    if low >= law.high:
        raise ConfigError(
            f"blockwise.sigma_max = {law.high:g} with {rows} classes and spacing = 'useful'",
            expected=f"more than {low:g}, below which noise hides no class",
        )
    return dataclasses.replace(law, low=max(law.low, low))


def useful_partition(
    law: Law, blocks: int, gap: Callable[[Tensor], Tensor], *, overlap: float = 0.0
) -> Partition:
    """The law's levels, divided among B blocks at equal areas of the gap over the mass.

    gap: levels (K,) float64 -> gaps (K,), of which what is below 0 counts as 0.  ConfigError where
    there is no gap at any level: then there is nothing to learn.
    """
    if blocks < 1:
        raise ConfigError(f"{blocks} blocks", expected="1 or more")
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    found = gap(law.level(middles)).double().clamp_min(0.0)
    whole = float(found.sum())
    if not (whole > 0 and math.isfinite(whole)):
        raise ConfigError(
            "spacing = 'useful', and the input tells nothing that the noised target does not",
            expected="data whose input says something about the target",
            hint="spacing = 'equal' divides without looking at the data.",
        )
    area = torch.cat((torch.zeros(1, dtype=torch.float64), found.cumsum(0))) / whole
    inner = [_level_of(law, area, part / blocks) for part in range(1, blocks)]
    return Partition(law, (law.low, *inner, law.high), overlap)


def _level_of(law: Law, area: Tensor, share: float) -> float:
    """The level below which a share of the area is: linear between the ends of a piece."""
    place = int(torch.searchsorted(area, share).clamp(1, LEVELS))
    before, after = area[place - 1], area[place]
    mass = (place - 1 + float((share - before) / (after - before))) / LEVELS
    return float(f"{float(law.level(torch.tensor(mass, dtype=torch.float64))):.{DIGITS}g}")


def linear_gap(
    law: Law, variance_E: Tensor, spectrum_E: Tensor, data_std: float
) -> Callable[[Tensor], Tensor]:
    """The gap of images between the best linear denoiser of all values together and the best of
    each value by itself, in units of the training's loss.

    variance_E: of each value.  spectrum_E: eigenvalues of the values' covariance. With noise sigma
    a direction of variance v is left with an error of v s / (v + s), s = sigma^2; the mean of that
    is weighted by w(sigma). Of a flow sigma = t / (1 - t), and the weight is 1 / t^2.
    """

    def gap(level_K: Tensor) -> Tensor:
        level = level_K.double()
        if isinstance(law, FlowTime):
            square, weight = (level / (1 - level).clamp_min(1e-12)).square(), 1 / level.square()
        else:
            square = level.square()
            weight = edm_weight(level, data_std)
        left = [
            (v[None] * square[:, None] / (v[None] + square[:, None])).mean(dim=1)
            for v in (variance_E.double(), spectrum_E.double().clamp_min(0.0))
        ]
        return weight * (left[0] - left[1])

    return gap


# ---- twins -------------------------------------------------------------------------------------


def useful_edges_ref(mass_K: list[float], gap_K: list[float], blocks: int) -> list[float]:
    """Twin of `useful_partition` in mass: the inner edges by walking along pieces of equal width,
    mass_K their upper ends."""
    whole, walked, low = sum(gap_K), 0.0, 0.0
    edges: list[float] = []
    for high, gap in zip(mass_K, gap_K, strict=True):
        while len(edges) < blocks - 1 and walked + gap >= whole * (len(edges) + 1) / blocks:
            wanted = whole * (len(edges) + 1) / blocks
            edges.append(low + (high - low) * (wanted - walked) / gap)
        walked, low = walked + gap, high
    return edges
