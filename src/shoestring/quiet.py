"""Silence where a failure is an answer: fake tensors log a page about every operator that does not
fit, also when it is only tried."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Nothing is logged by fake tensors inside; errors are raised all the same."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was
