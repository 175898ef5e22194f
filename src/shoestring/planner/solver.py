"""The chain dynamic program: which blocks keep their graph, which inputs are held, at any budget.

Blocks may differ and have several options each; what an option is worth depends on its place.
Two tables, over free memory m in slots:

    again(a, b, m)  seconds to bring backward through blocks a..b when only input a is held
        a == b:  run block a again with gradients, and its backward
        else:    min over j in a+1..b:  walk a..j-1 without gradients, hold input j,
                 then again(j, b, m - held_j), then again(a, j-1, m)
    top(a, m)       seconds of forward and backward of blocks a..n-1, and the turn
        min over options k:  keep block a by k, then top(a+1, m - saved_k)
        min over b >= a:     hold input a, walk a..b, top(b+1, m - held_a), again(a, b, m - held_a)

`again` restricted to equal blocks is Revolve's t(l, s). Gradients that appear during backward
shift the memory axis, so neighbours of the same kinds share a table wherever they stand.

Every size is rounded up to slots and the budget down, so a schedule found for m slots never
needs more than m slots. One solution answers every budget, with seconds that fall monotonically.

Cost: O(n^2) tables at most (O(n) for equal blocks), n per entry; numpy over m.
Sources: Rotor, arXiv 1911.13214; Griewank and Walther, ACM algorithm 799.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chain import BlockCost, Chain, Kept, Outcome, Piece, Redone, Schedule, Walk, evaluate

Table = NDArray[np.float64]
Choice = NDArray[np.int32]
SLOTS = 1000
"""Memory resolution. 96 blocks waste at most half a slot each: 5 % of the whole scale."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule with what the chain model says of it."""

    schedule: Schedule
    outcome: Outcome


class Solver:
    """Tables of one chain. `schedule(bytes)` answers a budget, `frontier()` all of them."""

    def __init__(self, chain: Chain, *, slots: int = SLOTS, quantum: int | None = None) -> None:
        self.chain = chain
        self.quantum = quantum or best_quantum(chain, slots)
        self.slots = self._need(_largest(chain))
        kinds: dict[BlockCost, int] = {}
        self._kinds = tuple(kinds.setdefault(b, len(kinds)) for b in chain.blocks)
        self._again: dict[tuple[int, ...], tuple[Table, Choice]] = {}
        self._top: list[tuple[Table, Choice]] = []
        self._fill_again()
        self._fill_top()

    def _need(self, size: int) -> int:
        return -(-size // self.quantum)

    # -- tables ------------------------------------------------------------------------------

    def _fill_again(self) -> None:
        n = len(self._kinds)
        for length in range(1, n + 1):
            for a in range(n - length + 1):
                key = self._kinds[a : a + length]
                if key not in self._again:
                    self._again[key] = self._solve_again(a, a + length - 1)

    def _solve_again(self, a: int, b: int) -> tuple[Table, Choice]:
        """Memory counts what is free above input a and above the gradients of blocks > b.
        Choices are j - a, since the table serves wherever the same kinds of blocks stand."""
        blocks = self.chain.blocks
        best = np.full(self.slots + 1, np.inf)
        choice = np.full(self.slots + 1, -1, np.int32)
        if a == b:
            if blocks[a].redone:
                best[self._need(blocks[a].again_peak - blocks[a].held) :] = blocks[a].again_seconds
            return best, choice
        # Walk a..j-1 with the gradient of b's output waiting.
        need, seconds = 0, 0.0
        for j in range(a + 1, b + 1):
            walked = blocks[j - 1]
            own = walked.walk_peak - (walked.held if j - 1 == a else 0)
            need = max(need, self._need(own + blocks[b].output))
            seconds += walked.walk_seconds
            left = self._shifted(a, j - 1, sum(x.gradients for x in blocks[j : b + 1]))
            right = self._shifted(j, b, blocks[j].held)
            _improve(best, choice, j - a, need, seconds + left + right)
        return best, choice

    def _shifted(self, a: int, b: int, taken: int) -> Table:
        """again(a, b) with `taken` bytes less to use."""
        return _shift(self._again[self._kinds[a : b + 1]][0], self._need(taken))

    def _fill_top(self) -> None:
        chain, n = self.chain, len(self._kinds)
        end = np.full(self.slots + 1, np.inf)
        end[self._need(chain.turn_peak) :] = 0.0
        tables: list[tuple[Table, Choice]] = [(end, np.zeros(0, np.int32))]
        for a in reversed(range(n)):
            tables.insert(0, self._solve_top(a, tables))
        self._top = tables

    def _solve_top(self, a: int, above: list[tuple[Table, Choice]]) -> tuple[Table, Choice]:
        """`above[i]` is top(a + 1 + i). Choices: option k is -1-k, a piece up to b is b."""
        chain, block = self.chain, self.chain.blocks[a]
        best = np.full(self.slots + 1, np.inf)
        choice = np.full(self.slots + 1, np.iinfo(np.int32).min, np.int32)
        held, need, seconds = self._need(block.held), 0, 0.0
        for b in range(a, len(self._kinds)):
            walked = chain.blocks[b]
            if not walked.redone:
                break
            need = max(need, (held if b > a else 0) + self._need(walked.walk_peak))
            seconds += walked.walk_seconds
            again = _shift(self._shifted(a, b, chain.gradients_above[b]), held)
            _improve(best, choice, b, need, seconds + again + _shift(above[b - a][0], held))
        # Options come second: at equal seconds the lower block is the one to run again.
        for k, option in enumerate(block.options):
            back = option.backward_peak + chain.gradients_above[a]
            need = self._need(max(option.forward_peak, back))
            after = _shift(above[0][0], self._need(option.saved))
            _improve(best, choice, -1 - k, need, after + option.seconds)
        return best, choice

    # -- answers -----------------------------------------------------------------------------

    def schedule(self, budget_bytes: int) -> Candidate | None:
        """The fastest schedule within `budget_bytes`, or None when none fits."""
        m = min(budget_bytes // self.quantum, self.slots)
        if m < 0 or not np.isfinite(self._top[0][0][m]):
            return None
        return self._candidate(m)

    def frontier(self) -> list[Candidate]:
        """One schedule per trade-off, peak rising and seconds falling strictly."""
        costs = self._top[0][0]
        steps = [m for m in range(len(costs)) if m == 0 or costs[m] < costs[m - 1]]
        return pareto([self._candidate(m) for m in steps if np.isfinite(costs[m])])

    def _candidate(self, m: int) -> Candidate:
        schedule = tuple(self._pieces(m))
        return Candidate(schedule, evaluate(self.chain, schedule))

    def _pieces(self, m: int) -> list[Piece]:
        pieces: list[Piece] = []
        a = 0
        while a < len(self._kinds):
            block, choice = self.chain.blocks[a], int(self._top[a][1][m])
            if choice < 0:
                pieces.append(Kept(a, -1 - choice))
                m -= self._need(block.options[-1 - choice].saved)
                a += 1
            else:
                m -= self._need(block.held)
                free = m - self._need(self.chain.gradients_above[choice])
                walks: list[Walk] = []
                self._walks(a, choice, free, walks)
                pieces.append(Redone(a, choice + 1, tuple(walks)))
                a = choice + 1
        return pieces

    def _walks(self, a: int, b: int, m: int, walks: list[Walk]) -> None:
        """The walks of again(a, b, m), outermost first."""
        stops, below = [], []
        low, free = a, m
        while low < b:
            j = low + int(self._again[self._kinds[low : b + 1]][1][free])
            passed = sum(x.gradients for x in self.chain.blocks[j : b + 1])
            below.append((low, j - 1, free - self._need(passed)))
            free -= self._need(self.chain.blocks[j].held)
            stops.append(j)
            low = j
        if stops:
            walks.append((a, b, tuple(stops[:-1])))
        for left in reversed(below):
            self._walks(*left, walks)


def _shift(table: Table, slots: int) -> Table:
    """The table as seen with `slots` less memory."""
    if slots <= 0:
        return table
    out = np.full_like(table, np.inf)
    if slots < len(table):
        out[slots:] = table[:-slots]
    return out


def _improve(best: Table, choice: Choice, name: int, need: int, seconds: Table) -> None:
    """Take `seconds` where it is better and at least `need` slots are free, in place."""
    better = seconds[need:] < best[need:]
    best[need:][better] = seconds[need:][better]
    choice[need:][better] = name


def _largest(chain: Chain) -> int:
    """Enough memory for every choice at once."""
    total = chain.turn_peak + chain.turn_gradients
    for b in chain.blocks:
        total += b.gradients + max([b.held, *(o.saved for o in b.options)])
    peaks = [max([b.again_peak, b.walk_peak + b.output, *(o.backward_peak for o in b.options)])
             for b in chain.blocks]  # fmt: skip
    return total + max(peaks) + max(b.held for b in chain.blocks) * 2


def best_quantum(chain: Chain, slots: int) -> int:
    """The slot size, near total / `slots`, that rounding wastes least on (sizes in a
    transformer are multiples of batch x tokens x width, so a good one usually exists)."""
    total = _largest(chain)
    sizes = np.array(
        [s for b in chain.blocks for s in (b.held, b.gradients, *(o.saved for o in b.options))]
    )
    tries = np.unique(np.linspace(total / slots, total / slots * 2, 400).astype(np.int64))
    tries = np.maximum(tries, 1)
    waste = [(int((-sizes % q).sum()) + total / 1000 * (q / tries[0]), int(q)) for q in tries]
    return min(waste)[1]


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both peak and seconds, by rising peak."""
    kept: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.outcome.peak_bytes, c.outcome.seconds)):
        if not kept or c.outcome.seconds < kept[-1].outcome.seconds:
            kept.append(c)
    return kept
