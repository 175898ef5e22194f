"""The rules of two-stream walks: one step up, one step down, exact on integers.

Every rule is one two-step recurrence over streams x[0], x[1], ...

    x[k+1] = A x[k-1] + B x[k] + C f_k(x[k])

Feistel (arXiv 1707.04585) and midpoint: A = 1, B = 0; leapfrog: A = -1, B = 2 (arXiv
2512.02056); random sign: A = s, B = 1 - s with s = +-1 drawn per sample; BDIA (arXiv 2407.09093):
A = g, B = 1 - g, C = 1 + g with g = +-1/2 drawn per sample, whose halving is made exact by one
kept bit per element. All coefficients act on integers, so the walk down is exact.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .ops.fixed_point import Grid, unpack_bits
from .tape import Evaluation


@dataclass(frozen=True, slots=True)
class Rule:
    """A member of the two-step family. `draws`: its coefficients are random per sample and its
    mean is the ordinary residual step, so it is served (and evaluated) as the plain network."""

    name: str
    a: float
    b: float
    c: float
    draws: bool = False
    halves: bool = False

    @property
    def terms(self) -> int:
        """Sum of the largest |coefficients| of the streams and of the update, rounded up."""
        return 4 if self.draws or self.b else 2


RULES = {
    rule.name: rule
    for rule in (
        Rule("feistel", 1.0, 0.0, 1.0),
        Rule("midpoint", 1.0, 0.0, 1.0),  # step h = 1/2: C = 2 h
        Rule("leapfrog", -1.0, 2.0, 1.0),  # step h = 1: C = h^2
        Rule("random_sign", 0.0, 1.0, 1.0, draws=True),
        Rule("bdia", 0.0, 1.0, 1.0, draws=True, halves=True),
    )
}


@dataclass(slots=True)
class Step:
    """One step of one forward: what the walk down needs besides the streams."""

    evaluation: Evaluation
    sign: Tensor | None = None  # +-1 per sample, (batch, 1, ...), for rules that draw
    plain: bool = False  # x[k+1] = x[k] + f(x[k]): first step and eval mode of rules that draw
    bits: Tensor | None = None  # packed side bits (BDIA)
    output: Tensor | None = None  # f_k's output, where it is held to shorten the replay
    sums: tuple[int, int] | None = None  # checksum of x[k-1] (verify)
    shape: torch.Size = field(default_factory=torch.Size)


@dataclass(frozen=True, slots=True)
class Lattice:
    """A rule on a grid: one step up and one step down, in integers (or floats, when asked for)."""

    rule: Rule
    grid: Grid

    @property
    def limit(self) -> float:
        """What every |stream| and |update| has to stay under."""
        return self.grid.limit(self.rule.terms)

    def coarser(self, amax: float) -> "Lattice":
        """The rule on a grid that has room for values of `amax`."""
        streams = self.grid.streams
        return Lattice(self.rule, Grid(streams, Grid.calibrated(streams, amax)))

    def reencode(self, stream: Tensor, old: "Lattice") -> Tensor:
        """A stream of a finer lattice on this one, rounded to the nearest."""
        places = old.grid.scale_bits - self.grid.scale_bits
        # Not (x + half) >> places, which may wrap.
        return (stream >> places) + ((stream >> (places - 1)) & 1)

    def advance(self, step: Step, prev: Tensor, cur: Tensor, u: Tensor) -> Tensor:
        """x[k+1] from x[k-1], x[k] and u = f_k(x[k])."""
        rule, grid = self.rule, self.grid
        if step.plain:
            return cur + grid.encode(u)
        if not rule.draws:
            update = grid.encode(u if rule.c == 1 else u * rule.c)
            if rule.b:
                update = update.add_(cur, alpha=int(rule.b))
            return update.add_(prev, alpha=int(rule.a))
        assert step.sign is not None
        if not rule.halves:
            return step.sign * prev + (1 - step.sign) * cur + grid.encode(u)
        return step.sign * self._halved(step, prev) + self._rest(step, cur, u)

    def retreat(self, step: Step, cur: Tensor, nxt: Tensor, u: Tensor) -> Tensor:
        """x[k-1] from x[k], x[k+1] and u = f_k(x[k]). May overwrite x[k+1]."""
        rule, grid = self.rule, self.grid
        if step.plain:
            # Only the first step is taken so while training, and it starts from x[-1] = x[0].
            return cur
        if not rule.draws:
            nxt = nxt.sub_(grid.encode(u if rule.c == 1 else u * rule.c))
            if rule.b:
                nxt = nxt.sub_(cur, alpha=int(rule.b))
            return nxt if rule.a == 1 else nxt.neg_()
        assert step.sign is not None
        if not rule.halves:
            return step.sign * (nxt - (1 - step.sign) * cur - grid.encode(u))
        half = step.sign * (nxt - self._rest(step, cur, u))
        if not grid.exact:
            return 2 * half
        assert step.bits is not None
        return 2 * half - unpack_bits(step.bits, step.shape, half.dtype)

    def _halved(self, step: Step, prev: Tensor) -> Tensor:
        """(x[k-1] + s) / 2 with the side bit s = x[k-1] mod 2."""
        if not self.grid.exact:
            return prev / 2
        return (prev + (prev & 1)) >> 1

    def _rest(self, step: Step, cur: Tensor, u: Tensor) -> Tensor:
        """(1 - g) x[k] + (1 + g) u on the grid, g = sign / 2."""
        assert step.sign is not None
        update = self.grid.encode(u * (1 + 0.5 * step.sign.to(u.dtype)))
        if not self.grid.exact:
            return cur * (1 - 0.5 * step.sign) + update
        # (1 - g) x is x/2 or x + x/2; halves round down, the same way up and down the walk.
        return torch.where(step.sign > 0, cur >> 1, cur + (cur >> 1)) + update
