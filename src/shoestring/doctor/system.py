"""What a process has beyond its tensors: the C allocator's share, and CUDA's cache."""

from collections.abc import Mapping
from typing import Any

from ..allocator import SETTINGS, tuned_environment
from ..planner.budget import CPU_MARGIN_TUNED, CUDA_MARGIN
from ..units import format_bytes
from .diagnosis import Advice

WORTH = 10
"""From a tenth of what the tensors grew by."""
LEAST = 64 * 2**20
"""Less than this is libraries loading their kernels."""


def process_advice(facts: Mapping[str, Any], peak: int) -> list[Advice]:
    """Settings of the allocator, where it keeps much more than the tensors need."""
    found = facts["allocator"]
    if found.get("reserved_bytes") is not None:
        return _cuda(found)
    over, grew = found["over_bytes"], facts["peak_bytes"] - facts["baseline_bytes"]
    if over is None or found["tuned"] or not tuned_environment():
        return []
    saving = int(over - CPU_MARGIN_TUNED * grew)
    if saving < max(LEAST, grew // WORTH):
        return []
    settings = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
    return [
        Advice(
            name="malloc",
            what="have the C library give freed memory back: the process grew by "
            f"{format_bytes(over)} more than its tensors did (of the resident set, not of the "
            "tensors' peak; what tuned processes keep, 8 %, is left out)",
            how=f"{settings} python train.py", cost="more page faults: some time",
            saving_bytes=saving, basis="measured",
        )
    ]  # fmt: skip


def _cuda(found: Mapping[str, Any]) -> list[Advice]:
    over = found["reserved_bytes"] - found["allocated_bytes"]
    saving = int(over - CUDA_MARGIN * found["allocated_bytes"])
    if saving < max(LEAST, found["allocated_bytes"] // WORTH):
        return []
    return [
        Advice(
            name="expandable_segments",
            what="let CUDA's segments grow: the cache held "
            f"{format_bytes(over)} more than was ever allocated at once (at most that is saved)",
            how="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train.py", cost="none",
            saving_bytes=saving, basis="measured",
        )
    ]  # fmt: skip
