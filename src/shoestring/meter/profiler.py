"""The allocator's own account of a piece of work, by torch's profiler."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def allocator_peak(function: Callable[[], object]) -> int:
    """Peak bytes torch's CPU allocator held above its start while `function` ran.

    Exact, kernels' own scratch included, but slow: it reads the profiler's memory events.
    Sizes are summed from zero here, because the profiler's running total is per process and
    misses what is freed between two windows.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
    ) as profiled:
        function()
    results = profiled.profiler.kineto_results
    events = sorted(_allocations(results.experimental_event_tree()))
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak


def _allocations(tree: Iterable[Any]) -> Iterator[tuple[int, int]]:
    pending = list(tree)
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            yield event.start_time_ns, event.extra_fields.alloc_size
