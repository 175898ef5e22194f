"""Work that no operator shows: bytes to a disk and back, loops cut short under fake tensors.

Whoever does such work says how many bytes an elementwise operator would write in that time; an
estimate of work that watches operators adds them. Only good for comparing ways to run one model.
"""

_bytes = 0


def unseen_bytes(count: int) -> None:
    """So many bytes' worth of work was done, or would have been."""
    global _bytes
    _bytes += count


def unseen_so_far() -> int:
    """What was said until now; differences of it count."""
    return _bytes
