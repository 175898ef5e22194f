"""One thread, and only the packages that are there."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
