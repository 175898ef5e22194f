"""The chain dynamic program against brute force, against Revolve, and against its own promises."""

import math
import random

import pytest
from benchmarks.planner.every import schedules_ref

from shoestring.planner.chain import (
    BlockCost,
    Chain,
    Option,
    Redone,
    Walk,
    evaluate,
    keep_all,
    nested,
)
from shoestring.planner.solver import Solver


def random_chain(rng: random.Random, n: int, options: int) -> Chain:
    blocks = []
    for _ in range(n):
        held = rng.randint(1, 4)
        output = rng.randint(1, 4)
        ways = []
        for k in range(options):
            saved = rng.randint(1, 20)
            ways.append(
                Option(
                    name=f"way{k}",
                    saved=saved,
                    forward_peak=saved + rng.randint(0, 6),
                    backward_peak=saved + rng.randint(1, 8),
                    seconds=rng.randint(2, 12),
                )
            )
        blocks.append(
            BlockCost(
                held=held,
                output=output,
                walk_peak=held + output + rng.randint(0, 4),
                walk_seconds=rng.randint(1, 4),
                again_peak=held + rng.randint(2, 25),
                again_seconds=rng.randint(3, 12),
                gradients=rng.choice([0, 0, 1, 3]),
                options=tuple(ways),
                redone=rng.random() > 0.1,
            )
        )
    return Chain(
        blocks=tuple(blocks), turn_peak=rng.randint(2, 12), turn_gradients=rng.randint(0, 3)
    )


@pytest.mark.parametrize(("n", "options", "seeds"), [(1, 3, 5), (3, 3, 8), (4, 3, 4), (5, 2, 2)])
def test_solver_equals_brute_force_at_every_budget(n, options, seeds):
    for seed in range(seeds):
        chain = random_chain(random.Random(1000 * n + seed), n, options)
        every = [evaluate(chain, s) for s in schedules_ref(chain)]
        solver = Solver(chain, quantum=1)
        for budget in sorted({o.peak_bytes for o in every} | {1, 10_000}):
            fitting = [o.seconds for o in every if o.peak_bytes <= budget]
            found = solver.schedule(budget)
            if not fitting:
                assert found is None
            else:
                assert found is not None
                assert found.outcome.peak_bytes <= budget
                assert found.outcome.seconds == min(fitting)


def test_solver_equals_brute_force_for_six_blocks_of_two_kinds():
    rng = random.Random(6)
    two = random_chain(rng, 2, 1).blocks
    chain = Chain(blocks=two * 3, turn_peak=5, turn_gradients=2)
    every = [evaluate(chain, s) for s in schedules_ref(chain)]
    solver = Solver(chain, quantum=1)
    for budget in range(min(o.peak_bytes for o in every), max(o.peak_bytes for o in every)):
        found = solver.schedule(budget)
        assert found.outcome.peak_bytes <= budget
        assert found.outcome.seconds == min(o.seconds for o in every if o.peak_bytes <= budget)


def revolve_ref(length: int, states: int) -> int:
    """Extra forward steps, closed form (Griewank and Walther)."""
    r = 0
    while math.comb(states + r, states) < length:
        r += 1
    return r * length - math.comb(states + r, states + 1)


@pytest.mark.parametrize(("length", "states"), [(1, 1), (5, 1), (12, 3), (24, 4), (32, 5), (48, 4)])
def test_equal_blocks_reproduce_revolve(length, states):
    """Equal blocks, only holding inputs and walking allowed, a walk costs 1 and needs no memory
    of its own: the seconds of going back through all of them are t(length, states)."""
    block = BlockCost(held=1, output=0, walk_peak=0, walk_seconds=1, again_peak=1, again_seconds=0)
    chain = Chain(blocks=(block,) * length, turn_peak=0)
    first_forward = length
    budget = 1 + states  # Revolve does not count the state that the reversed step starts from
    piece = Redone(0, length, best_walks(chain, budget))
    outcome = evaluate(chain, (piece,))
    assert outcome.seconds - first_forward == revolve_ref(length, states)
    assert outcome.peak_bytes <= budget


def best_walks(chain: Chain, budget: int) -> tuple[Walk, ...]:
    """The solver's way back through the whole chain as one piece."""
    solver = Solver(chain, quantum=1)
    walks: list[Walk] = []
    solver._walks(0, len(chain.blocks) - 1, budget - chain.blocks[0].held, walks)
    return tuple(walks)


def test_a_schedule_never_needs_more_than_its_slots():
    rng = random.Random(3)
    for seed in range(5):
        rng = random.Random(seed)
        chain = random_chain(rng, 9, 2)
        scale = [rng.uniform(0.7, 1.3) * 1e6 for _ in range(3)]
        big = Chain(
            blocks=tuple(scaled(b, scale[i % 3]) for i, b in enumerate(chain.blocks)),
            turn_peak=chain.turn_peak * 999_983,
            turn_gradients=chain.turn_gradients * 999_983,
        )
        solver = Solver(big, slots=150)
        costs = []
        for m in range(solver.slots + 1):
            found = solver.schedule(m * solver.quantum)
            if found is not None:
                assert found.outcome.peak_bytes <= m * solver.quantum
                costs.append(found.outcome.seconds)
        assert costs
        assert costs == sorted(costs, reverse=True)


def scaled(block: BlockCost, factor: float) -> BlockCost:
    def f(x: int) -> int:
        return int(x * factor)

    return BlockCost(
        held=f(block.held), output=f(block.output), walk_peak=f(block.walk_peak),
        walk_seconds=block.walk_seconds, again_peak=f(block.again_peak),
        again_seconds=block.again_seconds, gradients=f(block.gradients), redone=block.redone,
        options=tuple(
            Option(name=o.name, saved=f(o.saved), forward_peak=f(o.forward_peak),
                   backward_peak=f(o.backward_peak), seconds=o.seconds)
            for o in block.options
        ),
    )  # fmt: skip


def transformer(n: int, gradients: int = 0) -> Chain:
    """Equal blocks as in a GPT: input 1, inside 15, gradients as asked."""
    keep = Option(name="keep", saved=16, forward_peak=18, backward_peak=20, seconds=3.0)
    block = BlockCost(
        held=1, output=1, walk_peak=6, walk_seconds=1.0, again_peak=20 + gradients,
        again_seconds=3.0, gradients=gradients, options=(keep,),
    )  # fmt: skip
    return Chain(blocks=(block,) * n, turn_peak=12)


def test_the_first_block_is_redone_first():
    solver = Solver(transformer(8), quantum=1)
    found = solver.schedule(evaluate(solver.chain, keep_all(solver.chain)).peak_bytes - 15)
    redone = [p for p in found.schedule if isinstance(p, Redone)]
    assert [(p.start, p.stop) for p in redone] == [(0, 1)]


def test_a_deep_chain_beats_the_nested_scheme_at_its_own_peak():
    chain = transformer(96)
    solver = Solver(chain)
    for segment in (5, 10, 20):
        scheme = evaluate(chain, nested(chain, segment))
        found = solver.schedule(int(scheme.peak_bytes * 1.02))
        assert found.outcome.seconds <= scheme.seconds


def test_frontier_rises_in_peak_and_falls_in_seconds():
    frontier = Solver(transformer(24, gradients=2)).frontier()
    peaks = [c.outcome.peak_bytes for c in frontier]
    seconds = [c.outcome.seconds for c in frontier]
    assert len(frontier) > 20
    assert peaks == sorted(set(peaks))
    assert seconds == sorted(set(seconds), reverse=True)
    assert frontier[-1].schedule == keep_all(transformer(24))
