"""The reversible engine: two residual streams that are walked up in forward and down in backward.

Every rule is one two-step recurrence over streams x[0], x[1], ...

    x[k+1] = A x[k-1] + B x[k] + C f_k(x[k])

Feistel (arXiv 1707.04585) and midpoint: A = 1, B = 0; leapfrog: A = -1, B = 2 (arXiv
2512.02056); random sign: A = s, B = 1 - s with s = +-1 drawn per sample; BDIA (arXiv 2407.09093):
A = g, B = 1 - g, C = 1 + g with g = +-1/2 drawn per sample, whose halving is made exact by one
kept bit per element. All coefficients act on integers, so the walk down is exact.

Only the last pair of streams is kept. Backward reaches f_k through a replayed region whose input
is read from the pair above it; the same evaluation gives the local gradient and, subtracted, the
pair below. Integers carry no gradient, so zero-stride float *carriers* walk the autograd graph
beside the streams; a carrier's value means nothing.

Memory: the pair (2 n elements of 4 bytes), its gradients (2 n), one sub-block's inside; BDIA
n / 8 bytes per step more. Time: one more forward of every sub-block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import ConfigError, ReplayMismatch, StackError, StreamOverflow, TrainingDiverged
from .ops.fixed_point import Grid, checksum, largest, pack_bits, unpack_bits
from .stack import hidden_of
from .tape import Evaluation, replayed


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


class StreamTape:
    """The streams of one forward pass."""

    def __init__(self, rule: Rule, grid: Grid, *, verify: bool = False) -> None:
        if verify and not grid.exact:
            raise ConfigError(
                f"verify needs integer streams, not {grid.streams}",
                hint="Float streams are not rebuilt exactly; use streams='int32'.",
            )
        self.rule, self.grid, self.verify = rule, grid, verify
        self.steps: list[Step] = []
        self.sizes: list[Tensor] = []  # largest |value| of every update and stream, in order
        self.checked = False
        # The pair that backward walks: (x[level-1], x[level]).
        self.pair: list[Tensor] = []
        self.level = -1
        # Told the largest |value| of the pass once it is read (and in range).
        self.measured: Callable[[float], None] | None = None

    # One step, in integers (or floats, when asked for).

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

    # The walk in backward.

    def seal(self, prev: Tensor, cur: Tensor) -> None:
        """Keep the pair above the last replayed step."""
        self.pair = [prev, cur]
        self.level = len(self.steps)

    def input_of(self, k: int, dtype: torch.dtype) -> Tensor:
        """The input x[k] of sub-block k, read from the pair above it."""
        self.check()
        with torch.no_grad():
            while self.level > k + 1:
                below = self.steps[self.level - 1]
                self.step_down(self.level - 1, below.evaluation.again(self._read(0, dtype)))
            while self.level < k + 1:
                self._step_up(dtype)
            return self._read(0, dtype)

    def _read(self, which: int, dtype: torch.dtype) -> Tensor:
        return self.grid.decode(self.pair[which], dtype)

    def input_and_down(self, k: int, dtype: torch.dtype) -> Tensor:
        """`input_of` for a step whose output is held: the walk goes on without waiting for it."""
        x = self.input_of(k, dtype)
        held, self.steps[k].output = self.steps[k].output, None
        if held is not None:
            self.step_down(k, held)
        return x  # in a second backward nothing is held, and the next question walks down

    def step_down(self, k: int, output: Any) -> None:
        """From (x[k], x[k+1]) and f_k's repeated output to (x[k-1], x[k])."""
        assert self.level == k + 1
        step = self.steps[k]
        with torch.no_grad():
            cur, nxt = self.pair
            self.pair = []
            below = self.retreat(step, cur, nxt, hidden_of(output).detach())
            self.pair = [below, cur]
        self.level = k
        if step.sums is not None and checksum(below) != step.sums:
            raise ReplayMismatch(
                f"sub-block {k} gave another output when it was run again in backward",
                expected="the same output, bit for bit, as in forward",
                hint="Look for random numbers drawn outside torch's generators, in-place changes "
                "of the stream or of a parameter between forward and backward, or kernels that "
                "differ with gradients off (fast paths of nn.MultiheadAttention in eval mode).",
            )

    def _step_up(self, dtype: torch.dtype) -> None:
        """Back up, when backward asks for a step above where it stands (a second backward)."""
        step = self.steps[self.level]
        output = step.evaluation.again(self._read(1, dtype))
        prev, cur = self.pair
        self.pair = [cur, self.advance(step, prev, cur, hidden_of(output))]
        self.level += 1

    # Range.

    def check(self) -> None:
        """Raise if a stream or an update left the grid's range. Reads the device once."""
        if self.checked:
            return
        self.checked = True
        sizes, self.sizes = self.sizes, []
        if not self.grid.exact or not sizes or isinstance(sizes[0], FakeTensor):
            return
        values: list[float] = torch.stack(sizes).tolist()
        limit = self.grid.limit(self.rule.terms)
        if all(v < limit for v in values):  # NaN is not
            if self.measured is not None:
                self.measured(max(values))
            return
        first = next(i for i, v in enumerate(values) if not v < limit)
        what = "the stream read by" if first % 2 == 0 else "the output of"
        if not math.isfinite(values[first]):
            raise TrainingDiverged(
                f"{what} sub-block {first // 2} of the reversible stack holds {values[first]}",
                expected="finite values",
                hint="Lower the learning rate or clip gradients; nothing was updated.",
            )
        fits = Grid.calibrated(self.grid.streams, values[first], margin=4)
        raise StreamOverflow(
            f"{what} sub-block {first // 2} of the reversible stack reaches {values[first]:.4g}",
            expected=f"less than {limit:g} with scale_bits={self.grid.scale_bits}",
            hint=f"Use scale_bits={fits} or scale_bits='auto'; nothing was updated.",
        )


class _Enter(torch.autograd.Function):
    """x -> carrier; the stream itself is put where the caller finds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        # Its dtype is that of the stream's gradient: never 16 bits.
        return _carrier(x, torch.float64 if x.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class _Read(torch.autograd.Function):
    """carrier -> values of the stream it stands for."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, grid: Grid, stream: Tensor, dtype: Any) -> Tensor:
        ctx.dtype = carrier.dtype
        return grid.decode(stream, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None, None


class _Advance(torch.autograd.Function):
    """Carriers of x[k-1], x[k] and the update -> carrier of x[k+1]: the rule's own gradient."""

    @staticmethod
    def forward(ctx: Any, prev: Tensor, cur: Tensor, u: Tensor, rule: Rule, step: Step) -> Tensor:
        ctx.rule, ctx.plain, ctx.sign, ctx.dtype = rule, step.plain, step.sign, u.dtype
        return _carrier(cur, cur.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rule = ctx.rule
        if ctx.plain:
            a, b, c = 0.0, 1.0, 1.0
        elif not rule.draws:
            a, b, c = rule.a, rule.b, rule.c
        else:
            g = ctx.sign.to(grad.dtype) * (0.5 if rule.halves else 1.0)
            a, b, c = g, 1 - g, 1 + g if rule.halves else 1.0
        return (
            _times(grad, a),
            _times(grad, b),
            _times(grad, c).to(ctx.dtype),  # type: ignore[union-attr]
            None,
            None,
        )


def _times(grad: Tensor, factor: Any) -> Tensor | None:
    if isinstance(factor, float):
        return None if factor == 0 else grad if factor == 1 else grad * factor
    return grad * factor


def _carrier(like: Tensor, dtype: torch.dtype) -> Tensor:
    # NaN, so that whatever takes it for values (a hook on a layer, say) is seen to be wrong.
    return torch.full((), math.nan, dtype=dtype, device=like.device).expand(like.shape)


class StreamRun:
    """One forward pass through a reversible stack, a sub-block at a time.

    start(prev, cur) -> step(f) ... -> finish() -> (prev, cur), all values float tensors (B, ..., d)
    in the dtype given. `replay` steps are rebuilt in backward; the others keep their graph.
    """

    def __init__(self, rule: Rule, grid: Grid, *, training: bool, verify: bool = False) -> None:
        self.tape = StreamTape(rule, grid, verify=verify)
        self.grid, self.rule = grid, rule
        # Evaluated, a rule that draws is the plain network, which cannot be walked down.
        self.plain = rule.draws and not training
        self.prev: Tensor
        self.cur: Tensor
        self.count = 0

    def start(self, prev: Tensor, cur: Tensor) -> None:
        self.dtype = cur.dtype
        with torch.no_grad():
            # Both streams often start from one tensor; encode it once.
            self.cur = self.grid.encode(cur)
            self.prev = self.cur if prev is cur else self.grid.encode(prev)
        self.cur_carrier = _Enter.apply(cur)
        self.prev_carrier = self.cur_carrier if prev is cur else _Enter.apply(prev)

    def _read(self) -> Tensor:
        x = _Read.apply(self.cur_carrier, self.grid, self.cur, self.dtype)
        self.tape.sizes.append(largest(x))
        return x

    def step(
        self,
        f: Callable[[Tensor], Any],
        module: nn.Module | None,
        *,
        replay: bool,
        hold_output: bool = False,
    ) -> Any:
        """Advance by sub-block f; returns f's raw output (its update may be its first element).

        hold_output: keep f's output as well (n elements of its dtype). The replay then ends with
        the last tensor that backward needs, before f's last matrix product. Not with verify,
        which compares what the replay gives.
        """
        tape, k = self.tape, self.count
        replay = replay and not self.plain
        step = Step(Evaluation(f, module))
        if self.rule.draws:
            self._draw(step)
        if replay:
            if len(tape.steps) != k:
                raise StackError("a replayed step after a kept one")
            tape.steps.append(step)
            dtype = self.dtype
            hold_output = hold_output and not tape.verify
            # Nothing is below the first step, so its replay need not reach its output either.
            short = hold_output or (k == 0 and not tape.verify)
            find = tape.input_and_down if hold_output else tape.input_of
            output = replayed(
                step.evaluation,
                self._read(),
                lambda: find(k, dtype),
                after=None if short else lambda out: tape.step_down(k, out),
                early_stop=short,
            )
            if hold_output:
                step.output = hidden_of(output).detach()
        else:
            if tape.level < 0 and tape.steps:
                tape.seal(self.prev, self.cur)
            output = f(self._read())
        u = hidden_of(output)
        if u.shape != self.cur.shape:
            raise StackError(
                f"sub-block {k} returned shape {tuple(u.shape)}",
                expected=f"the stream's shape {tuple(self.cur.shape)}",
            )
        with torch.no_grad():
            tape.sizes.append(largest(u))
            if replay and self.rule.halves and self.grid.exact and not step.plain:
                step.bits, step.shape = pack_bits(self.prev & 1), self.prev.shape
            if replay and tape.verify:
                step.sums = checksum(self.prev)
            nxt = tape.advance(step, self.prev, self.cur, u.detach())
        carrier = _Advance.apply(self.prev_carrier, self.cur_carrier, u, self.rule, step)
        self.prev, self.cur = self.cur, nxt
        self.prev_carrier, self.cur_carrier = self.cur_carrier, carrier
        self.count += 1
        return output

    def _draw(self, step: Step) -> None:
        """A sign per sample. The first step is the plain one where there is no x[-1]."""
        if self.plain or (self.count == 0 and self.prev is self.cur):
            step.plain = True
            return
        shape = (self.cur.shape[0],) + (1,) * (self.cur.dim() - 1)
        draw = torch.randint(0, 2, shape, device=self.cur.device, dtype=torch.int8)
        step.sign = (draw * 2 - 1).to(self.cur.dtype)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The last pair as floats. Range errors surface here, or, on a device where reading a
        flag means waiting, at the backward if there will be one."""
        tape = self.tape
        if tape.level < 0 and tape.steps:
            tape.seal(self.prev, self.cur)
        prev = _Read.apply(self.prev_carrier, self.grid, self.prev, self.dtype)
        cur = self._read()
        if cur.device.type == "cpu" or not (torch.is_grad_enabled() and tape.steps):
            tape.check()
        return prev, cur
