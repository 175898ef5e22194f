"""What the peak would have been without certain tensors: the measured step with lives cut out."""

from collections.abc import Callable, Collection, Iterable

from ..ops.chunked_loss import CHUNK_BYTES
from .facts import backward_end, is_logits
from .lives import Life
from .timeline import Visit
from .watch import Watch

Stretches = Iterable[tuple[int, int]]


def _peak(watch: Watch, there: Callable[[Life], Stretches]) -> int:
    return watch.lives.peak(watch.device, watch.now, there)[0]


def peak_without(watch: Watch, gone: Collection[Life], *, after_forward: bool = False) -> int:
    """The peak had these not been there, or only until the forward that made them was over."""
    out = set(gone)
    ends = {}
    if after_forward:
        for visit in watch.visits:
            if visit.block is None and visit.stop is not None:
                ends.update({id(life): visit.stop for life in visit.outputs})

    def there(life: Life) -> Stretches:
        if life not in out:
            return ((life.born, life.died),)
        return ((life.born, ends[id(life)]),) if id(life) in ends else ()

    return _peak(watch, there)


def without_logits(watch: Watch) -> int:
    """The peak with no logits but one chunk of them."""
    gone = [life for life in watch.lives if is_logits(watch, life)]
    largest = max((life.nbytes for life in gone), default=0)
    return peak_without(watch, gone) + min(largest, CHUNK_BYTES)


def peak_with_gradients_let_go(watch: Watch) -> int:
    """The peak had gradients been freed after each optimizer step: there again only from when
    the backward adds to them, which then would hand over the sum as it is."""

    def there(life: Life) -> Stretches:
        stretch = (life.born, life.died)
        if life.category != "gradients":
            return (stretch,)
        free = []
        for end in (-1, *watch.step_ends):
            start = next((at for at in life.written if at > end), None)
            if start is not None:
                free.append((end + 1, start - 1))
        return _less(stretch, free)

    return _peak(watch, there)


def _less(stretch: tuple[int, int], free: Iterable[tuple[int, int]]) -> Stretches:
    left = []
    start, stop = stretch
    for a, b in free:
        if a > stop or b < start:
            continue
        if start < a:
            left.append((start, a - 1))
        start = b + 1
    return [*left, (start, stop)]


def peak_with_blocks_run_again(watch: Watch, count: int) -> int:
    """The peak had blocks 0..count-1 kept only what they handed on, until the backward came to
    them: then everything they had kept is there again."""
    visits: dict[int, list[Visit]] = {}
    for visit in watch.visits:
        if visit.block is not None and visit.block < count and visit.stop and not visit.in_backward:
            visits.setdefault(visit.block, []).append(visit)

    def there(life: Life) -> Stretches:
        whole = ((life.born, life.died),)
        if life.category != "saved" or life.is_output or life.block not in visits:
            return whole
        visit = next((v for v in visits[life.block] if v.start <= life.born <= (v.stop or 0)), None)
        if visit is None or visit.stop is None or visit.stop >= life.died:
            return whole
        again = _back_at(watch, life.block, visit.stop)
        if again is None:
            return whole
        return ((life.born, visit.stop), (min(again, life.died), life.died))

    return _peak(watch, there)


def _back_at(watch: Watch, block: int, after: int) -> int | None:
    """When the backward of that forward comes to a block."""
    end = backward_end(watch, after) or watch.now + 1
    starts = [s.blocks[block] for s in watch.segments if block in s.blocks]
    return min((at for at in starts if after < at <= end), default=None)
