"""Every schedule there is for a short chain: what the solver's choices are held against."""

import itertools
from collections.abc import Iterator

from shoestring.planner.chain import Chain, Kept, Piece, Redone, Walk


def walks_of(a: int, b: int) -> Iterator[tuple[Walk, ...]]:
    """Every way to go back through blocks a..b from input a."""
    if a == b:
        yield ()
        return
    between = range(a + 1, b)
    for size in range(len(between) + 1):
        for held in itertools.combinations(between, size):
            stops = [a, *held, b]
            # Each stretch [stop, next stop - 1] is then gone back through on its own.
            parts = [list(walks_of(x, y - 1)) for x, y in itertools.pairwise(stops)]
            for combination in itertools.product(*parts):
                yield ((a, b, held), *itertools.chain(*combination))


def schedules_ref(chain: Chain, a: int = 0) -> Iterator[tuple[Piece, ...]]:
    """Every schedule there is."""
    n = len(chain.blocks)
    if a == n:
        yield ()
        return
    for k in range(len(chain.blocks[a].options)):
        for rest in schedules_ref(chain, a + 1):
            yield (Kept(a, k), *rest)
    for stop in range(a + 1, n + 1):
        if not all(b.redone for b in chain.blocks[a:stop]):
            break
        for walks in walks_of(a, stop - 1):
            for rest in schedules_ref(chain, stop):
                yield (Redone(a, stop, walks), *rest)
