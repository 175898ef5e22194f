"""What every test runs under: no network, fixed threads, seeds of its own."""

import os
from pathlib import Path

# Before torch is: on AMD processors with AVX-512, what MKL's products of small matrices give
# depends on where the matrices lie, in the last bit, unless it is told to be compatible. Tests that
# two ways to run a network are equal bit for bit need products that are equal to themselves.
_CPU = Path("/proc/cpuinfo")
if _CPU.exists() and "AuthenticAMD" in _CPU.read_text(encoding="utf-8", errors="replace"):
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

# Before transformers or datasets are imported: nothing is looked up on a hub, in any test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Times vary on shared machines, so no deadline; derandomised, so that a run can be repeated.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state at the start of every test."""
    import torch

    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped where there is no CUDA device."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
