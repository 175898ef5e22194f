"""The reversible engine: two residual streams that are walked up in forward and down in backward,
by a rule of `rules.py`.

Only the last pair of streams is kept. Backward reaches f_k through a replayed region whose input
is read from the pair above it; the same evaluation gives the local gradient and, subtracted, the
pair below. Integers carry no gradient, so zero-stride float *carriers* walk the autograd graph
beside the streams; a carrier's value means nothing.

Memory: the pair (2 n elements of 4 bytes), its gradients (2 n), one sub-block's inside; BDIA
n / 8 bytes per step more. Time: one more forward of every sub-block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .errors import (
    ConfigError,
    ReplayMismatch,
    ShoestringError,
    StackError,
    StreamOverflow,
    TrainingDiverged,
)
from .ops.fixed_point import Grid, checksum, largest, pack_bits
from .rules import RULES as RULES
from .rules import Lattice, Rule, Step
from .stack import hidden_of
from .tape import Evaluation, replayed


@dataclass(frozen=True, slots=True)
class Seam:
    """Where the grid changed in the middle of a pass: the pair below, on the finer lattice, and
    the lattice above."""

    above: Lattice
    lattice: Lattice
    prev: Tensor
    cur: Tensor


class StreamTape:
    """The streams of one forward pass, and the walk down them."""

    def __init__(self, lattice: Lattice, *, verify: bool = False) -> None:
        if verify and not lattice.grid.exact:
            raise ConfigError(
                f"verify needs integer streams, not {lattice.grid.streams}",
                hint="Float streams are not rebuilt exactly; use streams='int32'.",
            )
        self.lattice, self.verify = lattice, verify
        self.steps: list[Step] = []
        self.seams: dict[int, Seam] = {}  # by the step whose update did not fit
        self.sizes: list[Tensor] = []  # largest |value| of every update and stream, in order
        self.checked = False
        # The pair that backward walks: (x[level-1], x[level]), on `lattice`.
        self.pair: list[Tensor] = []
        self.level = -1
        # Told the largest |value| of the pass once it is read, and whether it was in range;
        # returns the k of the next pass.
        self.measured: Callable[[float, bool], int] | None = None

    # The walk in backward.

    def seal(self, lattice: Lattice, prev: Tensor, cur: Tensor) -> None:
        """Keep the pair above the last replayed step."""
        self.lattice, self.pair = lattice, [prev, cur]
        self.level = len(self.steps)

    def input_of(self, k: int, dtype: torch.dtype) -> Tensor:
        """The input x[k] of sub-block k, read from the pair above it."""
        self.check()
        with torch.no_grad():
            while self.level > k + 1:
                below = self.steps[self.level - 1]
                x = self._input_below(dtype)
                self.step_down(self.level - 1, below.evaluation.again(x))
            while self.level < k + 1:
                self._step_up(dtype)
            return self._input_below(dtype)

    def _input_below(self, dtype: torch.dtype) -> Tensor:
        """What the step below the pair read: the pair's lower stream, or its finer original."""
        seam = self.seams.get(self.level - 1)
        if seam is not None:
            return seam.lattice.grid.decode(seam.cur, dtype)
        return self.lattice.grid.decode(self.pair[0], dtype)

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
            below = self.lattice.retreat(step, cur, nxt, hidden_of(output).detach())
            self.pair = [below, cur]
            if seam := self.seams.get(k):
                # A walk down writes into its pair, and a second backward walks it once more.
                self.lattice, self.pair = seam.lattice, [seam.prev.clone(), seam.cur.clone()]
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
        output = step.evaluation.again(self.lattice.grid.decode(self.pair[1], dtype))
        prev, cur = self.pair
        if seam := self.seams.get(self.level):
            prev, cur = (seam.above.reencode(x, self.lattice) for x in (prev, cur))
            self.lattice = seam.above
        self.pair = [cur, self.lattice.advance(step, prev, cur, hidden_of(output))]
        self.level += 1

    # Range.

    def check(self) -> None:
        """Raise if a stream or an update left the grid's range. Reads the device once."""
        if self.checked:
            return
        self.checked = True
        sizes, self.sizes = self.sizes, []
        if not self.lattice.grid.exact or not sizes or isinstance(sizes[0], FakeTensor):
            return
        values: list[float] = torch.stack(sizes).tolist()
        limit = self.lattice.limit
        if all(v < limit for v in values):  # NaN is not
            if self.measured is not None:
                self.measured(max(values), True)
            return
        first = next(i for i, v in enumerate(values) if not v < limit)
        raise self.out_of_range(self.lattice, first, values[first])

    def out_of_range(self, lattice: Lattice, place: int, value: float) -> ShoestringError:
        """The error for the value at `place`: 2 k is the stream read by sub-block k, 2 k + 1 its
        output. Where the scale follows what is seen, it follows this, too."""
        what = "the stream read by" if place % 2 == 0 else "the output of"
        what = f"{what} sub-block {place // 2} of the reversible stack"
        if not math.isfinite(value):
            return TrainingDiverged(
                f"{what} holds {value}",
                expected="finite values",
                hint="Lower the learning rate or clip gradients; nothing was updated.",
            )
        grid = lattice.grid
        fits = Grid.calibrated(grid.streams, value, margin=4)
        if value >= Grid(grid.streams, fits).limit(lattice.rule.terms):
            hint = "No scale_bits holds that: look at what grows, or use streams='int64'"
        elif self.measured is not None:
            hint = f"It was 'auto' and is now {self.measured(value, False)}: run the step again"
        else:
            hint = f"Use scale_bits={fits} or scale_bits='auto'"
        return StreamOverflow(
            f"{what} reaches {value:.4g}",
            expected=f"less than {lattice.limit:g} with scale_bits={grid.scale_bits}",
            hint=f"{hint}; nothing was updated.",
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
    `watch`: read every size as it comes (on a device that means waiting) and, where one does not
    fit, go on with a coarser grid, holding the pair below (2 n elements); else sizes are read at
    the end, and one that does not fit is a StreamOverflow.
    """

    def __init__(
        self,
        rule: Rule,
        grid: Grid,
        *,
        training: bool,
        verify: bool = False,
        watch: bool = False,
    ) -> None:
        self.lattice = Lattice(rule, grid)
        self.tape = StreamTape(self.lattice, verify=verify)
        self.rule = rule
        self.watch = watch and grid.exact
        self.amax = 0.0  # seen so far, when watching
        # Evaluated, a rule that draws is the plain network, which cannot be walked down.
        self.plain = rule.draws and not training
        self.prev: Tensor
        self.cur: Tensor
        self.count = 0

    def start(self, prev: Tensor, cur: Tensor) -> None:
        self.dtype = cur.dtype
        # Under fake and meta tensors there is nothing to look at.
        self.watch = self.watch and not isinstance(cur, FakeTensor) and not cur.is_meta
        if self.watch:
            self._see(0, largest(prev), largest(cur))
            if self.amax >= self.lattice.limit:
                self.lattice = self._roomier(0)
        grid = self.lattice.grid
        with torch.no_grad():
            # Both streams often start from one tensor; encode it once.
            self.cur = grid.encode(cur)
            self.prev = self.cur if prev is cur else grid.encode(prev)
        self.cur_carrier = _Enter.apply(cur)
        self.prev_carrier = self.cur_carrier if prev is cur else _Enter.apply(prev)

    def _read(self) -> Tensor:
        x = _Read.apply(self.cur_carrier, self.lattice.grid, self.cur, self.dtype)
        self.tape.sizes.append(largest(x))
        return x

    def _see(self, place: int, *sizes: Tensor) -> None:
        """Take note of sizes now, which waits for the device. TrainingDiverged if not finite."""
        for value in map(float, sizes):
            if not math.isfinite(value):
                raise self.tape.out_of_range(self.lattice, place, value)
            self.amax = max(self.amax, value)

    def _roomier(self, place: int) -> Lattice:
        """A lattice for what was seen; StreamOverflow when there is none."""
        lattice = self.lattice.coarser(self.amax)
        if self.amax >= lattice.limit:
            raise self.tape.out_of_range(lattice, place, self.amax)
        return lattice

    def _fit(self, *, replay: bool) -> None:
        """Make room for step k's input and update. What lies below stays on the lattice it is on,
        and f_k has read it there: the walk down finds it in the seam."""
        k = self.count
        sizes, self.tape.sizes = self.tape.sizes, []
        for place, size in enumerate(sizes, 2 * k):
            self._see(place, size)
        if self.amax < self.lattice.limit:
            return
        old, self.lattice = self.lattice, self._roomier(2 * k + 1)
        if replay:
            self.tape.seams[k] = Seam(self.lattice, old, self.prev, self.cur)
        same = self.prev is self.cur
        self.cur = self.lattice.reencode(self.cur, old)
        self.prev = self.cur if same else self.lattice.reencode(self.prev, old)

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
                tape.seal(self.lattice, self.prev, self.cur)
            output = f(self._read())
        u = hidden_of(output)
        if u.shape != self.cur.shape:
            raise StackError(
                f"sub-block {k} returned shape {tuple(u.shape)}",
                expected=f"the stream's shape {tuple(self.cur.shape)}",
            )
        with torch.no_grad():
            tape.sizes.append(largest(u))
            if self.watch:
                self._fit(replay=replay)
            if replay and self.rule.halves and self.lattice.grid.exact and not step.plain:
                step.bits, step.shape = pack_bits(self.prev & 1), self.prev.shape
            if replay and tape.verify:
                step.sums = checksum(self.prev)
            nxt = self.lattice.advance(step, self.prev, self.cur, u.detach())
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
            tape.seal(self.lattice, self.prev, self.cur)
        prev = _Read.apply(self.prev_carrier, self.lattice.grid, self.prev, self.dtype)
        cur = self._read()
        if self.watch:
            # No sum wraps, whatever the last one is; what is too large for a sum was seen above.
            self._see(2 * self.count, *tape.sizes)
            tape.sizes.clear()
            if tape.measured is not None and self.amax:
                tape.measured(self.amax, True)
        if cur.device.type == "cpu" or not (torch.is_grad_enabled() and tape.steps):
            tape.check()
        return prev, cur
