"""What every combination of patches costs: each part is measured once and shared.

A combination is a module, a loss and a weights method at most, and some optimizer methods. What a
block costs depends only on those that change blocks; head and loss on nearly all; the optimizer's
states and its step on the optimizer methods. So a few measurements serve many combinations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import ConfigError
from ..methods import Method
from ..rows import rows_of
from ..stack import Span
from .chain import BlockCost, Chain, Kept, Option, Outcome, Redone, Schedule, evaluate
from .cost import Step, Twin, measure_chain
from .in_place import bare, strip
from .solver import Solver
from .timing import Timer
from .ways import Offer, Way, apply_ways, offer_for, patches_for, takes

HOLDS = 4
"""Into how many steps the blocks below a kept end are cut, for those whose output is held."""
PATCHED = 1.01
"""A patch counts as this much slower than the clock says, so that it is used where it buys
memory and never for noise."""

Patches = tuple[Way, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A model with patches, measured. Bytes; seconds.

    resident: what is there beside the blocks from step to step, and what the stem leaves alive.
    floor: the peak at the end of backward or while the optimizer steps.
    turn_seconds: stem, head and loss of a pass.  step_seconds: the optimizer.
    passes: forwards and backwards in a step.
    outcomes: the schedules worth a look, with what the chain model says of each.
    """

    patches: Patches
    offer: Offer
    chain: Chain
    kinds: list[int]
    resident: int
    floor: int
    turn_seconds: float
    step_seconds: float
    passes: int
    outcomes: Sequence[tuple[Schedule, Outcome]]

    def peak_bytes(self, outcome: Outcome) -> int:
        """Of a whole step with that schedule."""
        return max(self.resident + outcome.peak_bytes, self.floor)

    def seconds(self, outcome: Outcome) -> float:
        """Of a whole step with that schedule."""
        passes = (outcome.seconds + self.turn_seconds) * self.passes
        return (passes + self.step_seconds) * PATCHED ** len(self.patches)


@dataclass
class _Priced:
    """A chain by what its blocks and its turn depend on."""

    offer: Offer
    chain: Chain
    kinds: list[int]
    resident: int
    end_peak: int
    patches: Patches
    plain: bool

    @cached_property
    def outcomes(self) -> list[tuple[Schedule, Outcome]]:
        """The schedules worth a look."""
        if not self.offer.streams:
            return [(c.schedule, c.outcome) for c in Solver(self.chain).frontier()]
        n, holds = len(self.chain.blocks), len(self.offer.kept) > 1
        schedules = (
            from_the_end(n, top, hold)
            for top in range(n + 1)
            for hold in (sorted({(n - top) * k // HOLDS for k in range(HOLDS + 1)})
                         if holds else [0])
        )  # fmt: skip
        return [(s, evaluate(self.chain, s)) for s in schedules]


class Costs:
    """Measures combinations of patches of one step; remembers every part."""

    def __init__(
        self, step: Step, methods: Sequence[Method], *, whole: "Costs | None" = None
    ) -> None:
        """whole: the costs of the whole batch, when `step` is one with the batch in parts."""
        self.step = step
        self.methods = methods
        self.base = Twin(step, bare)
        self.offer = offer_for(self.base.stack, self.methods)
        if not self.offer.kept:
            raise ConfigError(
                f"{[m.name for m in methods]} leave no way to run the blocks of "
                f"{self.base.stack!r}",
                expected="at least one method that fits",
            )
        self.timer = Timer(step)
        self._twins: dict[Any, Twin] = {((), False): self.base}
        self._blocks: dict[Any, dict[int, BlockCost]] = {}
        self._chains: dict[Any, _Priced] = {}
        self._timed_chains: dict[Any, _Priced] = {}
        self._optimizers: dict[Any, tuple[int, int]] = {}
        self._evaluations: dict[Any, int] = whole._evaluations if whole is not None else {}
        self._times: dict[Any, list[tuple[float, float]]] = {}
        self._turns: dict[Any, float] = {}
        self._steps: dict[Any, float] = {}
        self._whole = whole
        passes = step.accumulate / whole.step.accumulate if whole is not None else 1
        self._share = 1 / passes  # of the whole batch, in a part
        self._steps_cut: dict[str, Costs] = {}

    @cached_property
    def combinations(self) -> list[Patches]:
        """Of patches that this model takes; the first is none."""
        with self.base.mode:
            whole = patches_for(
                self.base.model,
                self.methods,
                self.step.make,
                keeps_gradients=self.step.keeps_gradients,
            )
        in_parts = [
            (way, *patches) for way in self._cuts for patches in self._in_parts(way).combinations
        ]
        return whole + in_parts

    @cached_property
    def _cuts(self) -> list[Way]:
        """Ways to cut this batch."""
        found: list[Way] = []
        for m in self.methods if self._whole is None else ():
            if m.promises.applies_to == "batch":
                ways = [Way(m.name, dict(v)) for v in m.variants]
                found += [w for w in ways if w.config["parts"] <= rows_of(self.step.batch)]
        with self.base.mode:
            return [w for w in found if takes(self.base.model, [w])]

    def _in_parts(self, way: Way) -> "Costs":
        if way.label not in self._steps_cut:
            self._steps_cut[way.label] = Costs(self.step.cut([way]), self.methods, whole=self)
        return self._steps_cut[way.label]

    def variant(self, patches: Patches, *, plain: bool = False, timed: bool = False) -> Variant:
        """The model with patches.

        plain: take away what makes its stack special.  timed: seconds on the device; work takes
        their place where not.
        """
        for way in patches:
            if way.applies_to == "batch":
                rest = tuple(w for w in patches if w is not way)
                return replace(self._in_parts(way).variant(rest, timed=timed), patches=patches)
        priced = self._timed_chain(patches, plain) if timed else self._chain(patches, plain)
        states, floor = self._optimizer(patches, plain)
        if (division := self.step.division) is not None:  # what steps is divided as a whole
            states, floor = states // division.size, floor // division.size
        return Variant(
            patches=patches, offer=priced.offer, chain=priced.chain, kinds=priced.kinds,
            resident=priced.resident + states,
            floor=max(floor, priced.end_peak + states, self._evaluation(patches, plain) + states),
            outcomes=priced.outcomes,
            passes=self.step.accumulate,
            turn_seconds=self._turn_seconds(patches) if timed else 0.0,
            step_seconds=self._step_seconds(patches) if timed else 0.0,
        )  # fmt: skip

    # -- bytes -------------------------------------------------------------------------------

    def _twin(self, patches: Patches, plain: bool) -> Twin:
        """One of its own where the weights have another dtype: blocks are called otherwise."""
        other = tuple(w for w in patches if w.promises.changes_weights)
        key = (_name(other), plain)
        if key not in self._twins:

            def put(model: Any) -> None:
                (strip if plain else bare)(model)
                apply_ways(model, other, ())

            self._twins[key] = Twin(self.step, put)
        return self._twins[key]

    def _chain(self, patches: Patches, plain: bool) -> _Priced:
        on_chain = tuple(w for w in patches if w.changes_blocks or w.applies_to == "loss")
        key = (_name(on_chain), plain)
        if key not in self._chains:
            twin = self._twin(patches, plain)
            offer = offer_for(twin.stack, self.methods) if plain else self.offer
            # What is done to the loss changes no block.
            inside = tuple(w for w in patches if w.changes_blocks)
            known = self._blocks.setdefault((_name(inside), plain), {})
            with twin.patched(w for w in on_chain if not w.promises.changes_weights):
                chain, kinds, resident, end = measure_chain(twin, offer, known)
            self._chains[key] = _Priced(offer, chain, kinds, resident, end, inside, plain)
        return self._chains[key]

    def _optimizer(self, patches: Patches, plain: bool) -> tuple[int, int]:
        """(bytes of states, peak while it steps)."""
        ways = tuple(
            w for w in patches
            if w.applies_to in ("optimizer", "weights") or w.promises.changes_weights
        )  # fmt: skip
        key = (_name(ways), plain)
        if key not in self._optimizers:
            twin = self._twin(patches, plain)
            with twin.patched(w for w in ways if not w.promises.changes_weights):
                self._optimizers[key] = twin.optimizer(ways)
        return self._optimizers[key]

    def _evaluation(self, patches: Patches, plain: bool) -> int:
        """Peak of the evaluation without the optimizer's states; 0 where there is none."""
        if self.step.evaluate is None:
            return 0
        ways = tuple(w for w in patches if w.applies_to not in ("optimizer", "batch")
                     or w.promises.changes_weights)  # fmt: skip
        key = (_name(ways), plain)
        if key not in self._evaluations:

            def put(model: Any) -> None:
                (strip if plain else bare)(model)
                apply_ways(model, ways, ())

            found = self.step.evaluation(put, ways)
            assert found is not None
            self._evaluations[key] = found.peak_bytes - found.by_category["optimizer"]
        return self._evaluations[key]

    # -- seconds -----------------------------------------------------------------------------

    def _timed_chain(self, patches: Patches, plain: bool) -> _Priced:
        priced = self._chain(patches, plain)
        key = (id(priced), plain)
        if key not in self._timed_chains:
            blocks = tuple(
                timed_block(block, self._block_times(priced, kind))
                for block, kind in zip(priced.chain.blocks, priced.kinds, strict=True)
            )
            if priced.patches and not _of_another_dtype(priced.patches) and not plain:
                base = self._timed_chain((), plain).chain.blocks
                blocks = tuple(map(no_faster, blocks, base))
            if self._whole is not None:
                base = self._whole._timed_chain(patches, plain).chain.blocks
                blocks = tuple(
                    no_faster(b, w, self._share) for b, w in zip(blocks, base, strict=True)
                )
            self._timed_chains[key] = replace(priced, chain=replace(priced.chain, blocks=blocks))
        return self._timed_chains[key]

    def _block_times(self, priced: _Priced, kind: int) -> list[tuple[float, float]]:
        """(forward, backward) of every way on offer. A patched block, and one on a part of the
        batch, is timed kept and run again; its other ways take as much longer or shorter than the
        unpatched block's on the whole batch as keeping does."""
        ways = [*priced.offer.kept, *([priced.offer.redo] if priced.offer.redo else [])]
        inside = tuple(w for w in priced.patches if not w.promises.frees_gradients)
        key = (_name(inside), priced.plain, kind)
        if key in self._times:
            return self._times[key]
        twin = self._twin(inside, priced.plain)
        if inside:
            known = self._block_times(replace(priced, patches=()), kind)
        elif self._whole is not None:
            known = self._whole._block_times(priced, kind)
        else:
            self._times[key] = self.timer.block(self.base, twin, kind, ways, ())
            return self._times[key]
        first, *_, last = self.timer.block(self.base, twin, kind, [ways[0], ways[-1]], inside)
        forward, backward = (now / max(was, 1e-9) for now, was in zip(first, known[0], strict=True))
        scaled = [(f * forward, b * backward) for f, b in known]
        self._times[key] = [first, *scaled[1:-1], last] if len(ways) > 1 else [first]
        return self._times[key]

    def _turn_seconds(self, patches: Patches) -> float:
        # Neither when gradients go nor where the blocks' weights are changes it.
        ways = tuple(
            w for w in patches
            if w.applies_to in ("loss", "module") or w.promises.changes_weights
        )  # fmt: skip
        key = _name(ways)
        if key not in self._turns:
            seconds = self.timer.turn(self.base, self._twin(ways, plain=False), ways)
            if ways and not _of_another_dtype(ways):
                seconds = max(seconds, self._turn_seconds(()))
            if self._whole is not None:
                seconds = max(seconds, self._whole._turn_seconds(patches) * self._share)
            self._turns[key] = seconds
        return self._turns[key]

    def _step_seconds(self, patches: Patches) -> float:
        # When it steps does not change how long it takes.
        ways = tuple(
            w for w in patches if w.applies_to == "optimizer" and not w.promises.frees_gradients
        )
        # Adapters are fewer than the weights that are trained without them.
        trains = tuple(w for w in patches if w.applies_to == "adapters")
        key = _name(trains + ways)
        if key not in self._steps:
            self._steps[key] = self.timer.optimizer(self._twin(trains, plain=False), ways)
        return self._steps[key]


def _name(ways: Iterable[Way]) -> Any:
    """What tells combinations apart, settings included."""
    return tuple(way.label for way in ways)


def _of_another_dtype(ways: Iterable[Way]) -> bool:
    return any(way.promises.changes_weights for way in ways)


def from_the_end(blocks: int, top: int, hold: int) -> Schedule:
    """The last `top` blocks kept, of `hold` below them an output held, the others run again."""
    kept, held = blocks - top, blocks - top - hold
    return tuple(Redone(i, i + 1) if i < held else Kept(i, int(i < kept)) for i in range(blocks))


def spans_of(schedule: Schedule, offer: Offer) -> tuple[Span, ...]:
    """The schedule as spans, neighbours run the same way in one span."""
    if offer.streams:
        kept = [p.option for p in schedule if isinstance(p, Kept)]
        config = {"keep_top": kept.count(0)}
        if hold := kept.count(1):
            config["hold_outputs"] = hold
        return (Span(0, len(schedule), offer.kept[0].method, config),)
    spans: list[Span] = []
    run: list[Redone] = []

    def flush() -> None:
        if run:
            assert offer.redo is not None
            spans.append(_redo_span(run, offer.redo))
            run.clear()

    for piece in schedule:
        if isinstance(piece, Redone):
            run.append(piece)
            continue
        flush()
        way, i = offer.kept[piece.option], piece.index
        last = spans[-1] if spans else None
        if last and last.stop == i and (last.method, last.config) == (way.method, way.config):
            spans[-1] = replace(last, stop=i + 1)
        else:
            spans.append(Span(i, i + 1, way.method, way.config))
    flush()
    return tuple(spans)


def _redo_span(run: Sequence[Redone], way: Way) -> Span:
    start, stop = run[0].start, run[-1].stop
    config: dict[str, Any] = dict(way.config)
    if any(p.stop - p.start > 1 for p in run):
        config["hold"] = [p.start - start for p in run]
        walks = [(i - start, k - start, [h - start for h in held])
                 for p in run for i, k, held in p.rebuild if k - i > 1]  # fmt: skip
        config["rebuild"] = [list(w) for w in walks]
    return Span(start, stop, way.method, config)


def timed_block(block: BlockCost, times: Iterable[tuple[float, float]]) -> BlockCost:
    """The block with seconds: options in order, then the run from its input.

    Keeping everything is never slower than keeping less, and running again costs a forward more
    at most; what the clock says beyond that is noise.
    """
    taken = list(times)
    options: list[Option] = []
    keep = sum(taken[0])
    walk = taken[-1][0] if block.redone else 0.0
    for option, (forward, backward) in zip(block.options, taken, strict=False):
        seconds = min(max(forward + backward, keep), keep + taken[0][0])
        # A tie on the clock is noise: what runs anything again counts as slower than keeping.
        seconds = max(seconds, keep * 1.01) if options else seconds
        options.append(replace(option, seconds=seconds))
    again = min(max(taken[-1][1], taken[0][1]), keep) if block.redone else 0.0
    # Together slower than keeping, by as much as above.
    again = max(again, keep * 1.01 - walk)
    return replace(block, options=tuple(options), walk_seconds=walk, again_seconds=again)


def no_faster(block: BlockCost, plain: BlockCost, share: float = 1.0) -> BlockCost:
    """A patched block with seconds at least those of the block as it is, or one on a share of the
    batch with at least that share: both trade time for memory, and a clock that says otherwise is
    not to decide."""
    options = tuple(
        replace(o, seconds=max(o.seconds, share * p.seconds))
        for o, p in zip(block.options, plain.options, strict=True)
    )
    return replace(
        block, options=options, walk_seconds=max(block.walk_seconds, share * plain.walk_seconds),
        again_seconds=max(block.again_seconds, share * plain.again_seconds),
    )  # fmt: skip
