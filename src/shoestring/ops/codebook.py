"""Scalar codebooks that lose the least: Lloyd-Max levels of a known law.

A unit vector of width d that was rotated at random has coordinates of a known law, whatever it was:
a density in proportion to (1 - t^2)^((d-3)/2) on [-1, 1] (arXiv 2504.19874, Lemma 1), which tends
to a normal law of variance 1/d. For such a law the levels of least mean squared error are the
means of their own cells, and the cells end half-way between levels (Max 1960; Lloyd 1982).

Those equations are solved by Newton's method, whose matrix has three diagonals, from the levels
that are best for many bits (a density of levels in proportion to the cube root of the law's).
Levels are in units of 1/sqrt(d), so those of all widths look alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

MOST_BITS = 8
Values = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)
_FARTHEST = 12.0
"""In units of the law's deviation; what lies beyond weighs less than a float64 can tell."""


@dataclass(frozen=True, slots=True)
class Codebook:
    """levels: 2^bits, ascending, symmetric.  edges: between them.  Both times sqrt(d).

    error: mean squared error of a unit vector, which is d times that of a coordinate.
    """

    bits: int
    levels: tuple[float, ...]
    edges: tuple[float, ...]
    error: float


@cache
def codebook(bits: int, width: int | None = None) -> Codebook:
    """The codebook for coordinates of rotated unit vectors of that width; of the normal law where
    width is None. ConfigError for bits outside 1..8 or a width below 3."""
    if bits not in range(1, MOST_BITS + 1):
        raise ConfigError(f"a codebook of {bits} bits", expected=f"1 to {MOST_BITS}")
    if width is not None and width < 3:
        raise ConfigError(f"vectors of {width} coordinates", expected="3 or more")
    law, farthest = _law(width)
    levels = _solved(law, _first_levels(law, farthest, 2**bits), farthest)
    edges = (levels[1:] + levels[:-1]) / 2
    mass, first, second = _moments(law, _ends(levels, farthest))
    error = float(second.sum() - (2 * levels * first - levels**2 * mass).sum())
    return Codebook(bits, tuple(map(float, levels)), tuple(map(float, edges)), error)


def _law(width: int | None) -> tuple[Callable[[Values], Values], float]:
    """The density of sqrt(d) t, and where it ends."""
    if width is None:
        return lambda t: np.exp(-t * t / 2) / math.sqrt(2 * math.pi), _FARTHEST
    log_scale = (
        math.lgamma(width / 2) - math.lgamma((width - 1) / 2) - math.log(math.pi * width) / 2
    )
    power = (width - 3) / 2

    def density(t: Values) -> Values:
        inside = np.maximum(1 - t * t / width, 1e-300)
        return np.asarray(np.exp(log_scale + power * np.log(inside)))

    return density, min(_FARTHEST, math.sqrt(width))


def _ends(levels: Values, farthest: float) -> Values:
    return np.concatenate(([-farthest], (levels[1:] + levels[:-1]) / 2, [farthest]))


def _moments(
    law: Callable[[Values], Values], ends: Values
) -> tuple[Values, Values, Values]:  # fmt: skip
    """Mass, first and second moment of every cell."""
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    t = middle[:, None] + half[:, None] * _NODES
    weight = law(t) * _WEIGHTS * half[:, None]
    return weight.sum(1), (weight * t).sum(1), (weight * t * t).sum(1)


def _first_levels(law: Callable[[Values], Values], farthest: float, count: int) -> Values:
    t = np.linspace(-farthest, farthest, 20_001)
    grown = np.cumsum(np.cbrt(law(t)))
    wanted = (np.arange(count) + 0.5) / count
    levels = np.interp(wanted, grown / grown[-1], t)
    return np.asarray((levels - levels[::-1]) / 2)


def _solved(law: Callable[[Values], Values], levels: Values, farthest: float) -> Values:
    for _ in range(100):
        ends = _ends(levels, farthest)
        mass, first, _ = _moments(law, ends)
        mean = first / mass
        # How a cell's mean moves with its ends, each of which moves half as far as a level.
        at_low, at_high = law(ends[:-1]), law(ends[1:])
        low = at_low * (mean - ends[:-1]) / mass / 2
        high = at_high * (ends[1:] - mean) / mass / 2
        low[0] = high[-1] = 0.0
        matrix = np.diag(1 - low - high) - np.diag(low[1:], -1) - np.diag(high[:-1], 1)
        step = np.linalg.solve(matrix, mean - levels)
        # Shortened where it would put levels out of order.
        nearer = float((-np.diff(step) / np.diff(levels)).max())
        levels = levels + min(1.0, 0.5 / max(nearer, 1e-300)) * step
        levels = (levels - levels[::-1]) / 2
        if float(np.abs(step).max()) < 1e-13 * farthest:
            break
    return levels


# ---- twin --------------------------------------------------------------------------------------


def codebook_ref(bits: int, width: int | None = None, rounds: int = 20_000) -> list[float]:
    """Twin of `codebook`: Lloyd's own rounds, levels to the means of their cells, on a grid."""
    law, farthest = _law(width)
    t = np.linspace(-farthest, farthest, 4_000_001)
    weight = law(t)
    mass = np.concatenate(([0.0], np.cumsum(weight)))
    first = np.concatenate(([0.0], np.cumsum(weight * t)))
    levels = 3 * ((np.arange(2**bits) + 0.5) / 2**bits * 2 - 1)
    for _ in range(rounds):
        places = np.searchsorted(t, (levels[1:] + levels[:-1]) / 2)
        places = np.concatenate(([0], places, [len(t)]))
        new = np.diff(first[places]) / np.diff(mass[places])
        if float(np.abs(new - levels).max()) < 1e-10:
            break
        levels = new
    return [float(level) for level in levels]
